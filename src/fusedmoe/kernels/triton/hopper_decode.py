"""Few rows per expert on Hopper: weights stream once through a ring of shared memory.

Two persistent Gluon launches and a sum. In both GEMMs the weight rows are the M side of the WGMMA
and the slots of one block (BN of them, all of one expert) the N side. The ring of STAGES weight
tiles is filled by TMA and never drains between tiles: step i + STAGES is loaded as soon as step i
is consumed, whichever tile either belongs to. Token rows are gathered by cp.async onto the same
barrier.

up_kernel    grid (programs,): x [T, H], w1 -> act [R, I], row = slot. Two weight tiles per step:
             gate and up (or, without a gate, two neighbouring tiles); two of 32 rows are the M
             side of one product.
down_kernel  grid (programs,): act [R, I], w2 -> y [R, H], row = slot. It begins wherever a program
             of up_kernel has ended (programmatic dependent launch), and waits for a block's rows of
             act alone, whose tiles are counted: weights depend on nothing.
dealt_kernel the same where a ring holds more than a task: it waits for all of up_kernel, which then
             counts nothing.
sum_kernel   grid (T, cdiv(H, BLOCK)): y, weights -> out [T, H], in fp32, in one fixed order; y may
             be undefined afterwards (``discarded``).

A task is (block, tile of weight rows), an expert's blocks side by side (``find_task``): all but one
find its weights in the L2. Tasks of down_kernel are drawn from a counter, those of up_kernel where
there are many; others, and those whose ring holds more than one, go round robin. Slots without an
expert belong to no block, and their rows of act and y are neither written nor read.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.hopper_decode import decode_counters, decode_table
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton.discarded import discard_rows, may_discard
from fusedmoe.kernels.triton.hopper_decode_dealt import dealt_kernel
from fusedmoe.kernels.triton.hopper_decode_down import down_kernel
from fusedmoe.kernels.triton.hopper_decode_up import up_kernel
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    matrix_descriptor,
    weight_views,
)
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.tuning.hopper_tiles import DecodeTiles


@triton.jit
def sum_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    H,
    stride_out,
    num_mapped,
    num_local,
    PICKS: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    DISCARD: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One pass: rows, PARTS for each pick, are loaded before it is known which of them live, unless
    an expert map says that most of them do not. DISCARD: with one part for each pick."""
    follow_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, PADDED)
    pick = row // PARTS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    slot = token * PICKS + pick
    at = (token * (PICKS * PARTS) + row)[:, None] * H + column[None, :]
    wanted = (pick < PICKS)[:, None] & inside[None, :]
    expert = tl.load(ids_ptr + slot, pick < PICKS, -1, cache_modifier=".cg")
    live = local_expert(expert, map_ptr, num_mapped, num_local) >= 0
    if map_ptr is not None:
        wanted &= live[:, None]
    rows = tl.load(y_ptr + at, wanted, 0.0, cache_modifier=".cg").to(tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + slot, pick < PICKS, 0.0, cache_modifier=".cg")
        rows *= weight.to(tl.float32)[:, None]
    total = tl.sum(tl.where(live[:, None], rows, 0.0), 0)
    tl.store(out_ptr + token * stride_out + column, total, inside)
    if DISCARD:
        tl.debug_barrier()
        discard_rows(y_ptr, slot, live, tl.program_id(1) * BLOCK, H, BLOCK)


GROUP = 8  # of one expert's blocks, that share its weights

_launch_up = HopperLauncher(up_kernel)
_launch_down = HopperLauncher(down_kernel)
_launch_dealt = HopperLauncher(dealt_kernel)
_launch_sum = Launcher(sum_kernel, chained=True)


def decode(layer: LayerTensors[torch.Tensor], tables: MoEAlignment, tiles: DecodeTiles) -> None:
    """Launch the three kernels; the layer as checked by ``kernels.hopper_decode``."""
    y, out, topk_ids, expert_map = layer.y, layer.out, layer.topk_ids, layer.expert_map
    (T, K), (e, H, _) = topk_ids.shape, layer.w2.shape
    decode_gemms(layer, tables, tiles)
    warps = 1 if T <= 512 else 4
    _launch_sum(
        (T, -(-H // (256 * warps))),
        (y, layer.topk_weights, topk_ids, expert_map, out),
        (H, out.stride(0), 0 if expert_map is None else expert_map.shape[0], e),
        (K, 1, power_of_2(K), 256 * warps, may_discard(y, T * K)),
        warps,
    )


def decode_gemms(
    layer: LayerTensors[torch.Tensor], tables: MoEAlignment, tiles: DecodeTiles
) -> None:
    """up_kernel and down_kernel alone: the rows of the layer's y [R, H] whose slots the tables
    name, which are as long as ``decode_table`` says and serve once. What would weight and sum them
    is not looked at."""
    x, w1, w2, _, topk_ids, _, act, y, programs = layer[:9]
    activation, K = layer.epilogue, topk_ids.shape[1]
    e, H, I = w2.shape  # noqa: E741
    R = y.shape[0]
    sorted_ids, expert_ids, num_post = tables
    counters = decode_counters(sorted_ids, R, tiles.block, e)
    deals = tiles.down.outlasts(I)
    most = max(1, decode_table(R, tiles.block, e)[0] // tiles.block)
    kind = activation.shards, activation.interleaved
    gate, up, desc_rows = weight_views(w1, *kind, (tiles.up.rows, tiles.up.depth))
    _launch_up(
        programs,
        (gate, up),
        (layer.w1_bias, x, act, expert_ids, sorted_ids, num_post, counters),
        (x.stride(0), R, e, most, desc_rows, activation.limit, activation.alpha, activation.beta),
        (
            H, I, K, activation.formula, activation.gated, activation.interleaved,
            tiles.up.rows, tiles.block, tiles.up.depth, tiles.up.stages, GROUP,
            tiles.draws_up, not deals,
        ),
        num_warps=tiles.up.warps,
    )  # fmt: skip
    matrix = matrix_descriptor(w2, I, (tiles.down.rows, tiles.down.depth))
    sizes = (H, I, tiles.down.rows, tiles.block, tiles.down.depth, tiles.down.stages)
    if deals:
        tensors = (layer.w2_bias, act, y, expert_ids, sorted_ids, num_post)
        numbers = (R, e, most)
        _launch_dealt(programs, (matrix,), tensors, numbers, sizes, num_warps=tiles.down.warps)
    else:
        up_tiles = -(-I // (tiles.up.rows * (1 if activation.gated else 2)))
        _launch_down(
            programs,
            (matrix,),
            (layer.w2_bias, act, y, expert_ids, sorted_ids, num_post, counters),
            (R, e, most),
            (*sizes, GROUP, up_tiles),
            num_warps=tiles.down.warps,
        )
