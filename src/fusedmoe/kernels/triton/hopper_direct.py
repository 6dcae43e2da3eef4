"""One or two tokens on Hopper: as ``hopper_decode``, but without tables and without a sum.

Two persistent Gluon launches. One warp fills a ring with TMA, four warps multiply. A ring takes all
of a multiprocessor's shared memory: a program of the second launch begins where one of the first
has ended, and fills its ring with weights before it waits for the others.

up_kernel    grid (programs,): x [T, H], w1 -> act [R, I], row = slot. A task is (slot, VALID
             columns): TILE rows of gate above TILE rows of up, VALID of each loaded, are the M side
             of the WGMMA; the rows of x are the N side, of which the slot's own token counts.
down_kernel  grid (programs,): act, w2, weights -> out [T, H]. A task is (token, VALID columns): the
             weight rows of each of the token's picks are stacked to one M side, its rows of act are
             the N side, and only pick by same pick counts. The picks are then weighted and added in
             registers, in one fixed order.

VALID is chosen so that tasks come out even over the programs: a multiprocessor alone cannot draw
much more than its share of the memory's rate. All ids are held in registers: R <= SLOTS, a power of
two. Slots without an expert are skipped. Rows past VALID are never read out.
"""

import torch

from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton.hopper_direct_common import DirectCase
from fusedmoe.kernels.triton.hopper_direct_down import down_kernel
from fusedmoe.kernels.triton.hopper_direct_up import up_kernel
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    kept,
    matrix_descriptor,
    weight_views,
)
from fusedmoe.tuning.hopper_tiles import DirectTiles

# Of the eight warps that a program has.
MAX_REGISTERS = 104


_launch_up = HopperLauncher(up_kernel)
_launch_down = HopperLauncher(down_kernel)
_case = kept(DirectCase)


def direct_sizes(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> tuple[int, int, int, int]:
    """(R, ids that the map has or 0, and R and K as powers of two)."""
    R, K = topk_ids.numel(), topk_ids.shape[1]
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    return R, num_mapped, max(2, 1 << (R - 1).bit_length()), 1 << (K - 1).bit_length()


def direct(layer: LayerTensors[torch.Tensor], tiles: DirectTiles) -> None:
    """Launch both kernels; the layer as checked by ``kernels.hopper_direct``."""
    x, w1, w2, topk_weights, topk_ids, out, act, _, programs = layer[:9]
    activation, expert_map = layer.epilogue, layer.expert_map
    (e, H, I), K = w2.shape, topk_ids.shape[1]  # noqa: E741
    R, num_mapped, slots, picks = direct_sizes(topk_ids, expert_map)
    kind = activation.shards, activation.interleaved
    gate, up, desc_rows = weight_views(w1, *kind, (tiles.up_box, tiles.depth))
    _launch_up(
        programs,
        (gate, up, matrix_descriptor(x, H, (8, tiles.depth), stride=x.stride(0))),
        (layer.w1_bias, act, topk_ids, expert_map),
        (R, num_mapped, e, desc_rows, *activation.numbers),
        (
            _case(
                *(I, H, K, slots, 2 * tiles.up_rows, tiles.up_valid, tiles.up_stages),
                *(0, *activation[:3]),
            ),
        ),
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )
    _launch_down(
        programs,
        (
            matrix_descriptor(w2, I, (tiles.down_box, tiles.depth)),
            matrix_descriptor(act, I, (max(8, picks), tiles.depth)),
        ),
        (layer.w2_bias, topk_weights, out, topk_ids, expert_map),
        (out.stride(0), R, num_mapped, e),
        (
            _case(
                *(H, I, K, slots, tiles.down_rows, tiles.down_valid, tiles.down_stages),
                tiles.down_rows // picks,
            ),
        ),
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )
