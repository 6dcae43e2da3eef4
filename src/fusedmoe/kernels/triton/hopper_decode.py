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
sum_kernel   that of ``weighted_sum``.

A task is (block, tile of weight rows), an expert's blocks side by side (``find_task``): all but one
find its weights in the L2. Tasks of down_kernel are drawn from a counter, those of up_kernel where
there are many; others, and those whose ring holds more than one, go round robin. Slots without an
expert belong to no block, and their rows of act and y are neither written nor read.
"""

import torch

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.hopper_decode import decode_counters, decode_table
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton.discarded import may_discard
from fusedmoe.kernels.triton.hopper_decode_dealt import dealt_kernel
from fusedmoe.kernels.triton.hopper_decode_down import down_kernel
from fusedmoe.kernels.triton.hopper_decode_steps import DecodeCase
from fusedmoe.kernels.triton.hopper_decode_up import up_kernel
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    kept,
    matrix_descriptor,
    weight_views,
)
from fusedmoe.kernels.triton.weighted_sum import weighted_sum
from fusedmoe.tuning.hopper_tiles import DecodeTiles

GROUP = 8  # of one expert's blocks, that share its weights

_launch_up = HopperLauncher(up_kernel)
_launch_down = HopperLauncher(down_kernel)
_launch_dealt = HopperLauncher(dealt_kernel)
_case = kept(DecodeCase)


def decode(layer: LayerTensors[torch.Tensor], tables: MoEAlignment, tiles: DecodeTiles) -> None:
    """Launch the three kernels; the layer as checked by ``kernels.hopper_decode``."""
    decode_gemms(layer, tables, tiles)
    discard = may_discard(layer.y, layer.topk_ids.numel())
    weighted_sum(layer, few_tokens=512, discard=discard)


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
    up_wide = tiles.up.rows * (1 if activation.gated else 2)
    _launch_up(
        programs,
        (gate, up),
        (layer.w1_bias, x, act, expert_ids, sorted_ids, num_post, counters),
        (x.stride(0), R, e, most, desc_rows, *activation.numbers),
        (
            _case(
                N=I,
                D=H,
                WIDE=up_wide,
                SLOTS=tiles.block,
                DEPTH=tiles.up.depth,
                STAGES=tiles.up.stages,
                GROUP=GROUP,
                PICKS=K,
                FORMULA=activation.formula,
                GATED=activation.gated,
                INTERLEAVED=activation.interleaved,
                DRAWN=tiles.draws_up,
                COUNTED=not deals,
            ),
        ),
        num_warps=tiles.up.warps,
    )
    case = _case(
        N=H,
        D=I,
        WIDE=tiles.down.rows,
        SLOTS=tiles.block,
        DEPTH=tiles.down.depth,
        STAGES=tiles.down.stages,
        GROUP=GROUP,
        UP_TILES=0 if deals else -(-I // up_wide),
    )
    tensors = (layer.w2_bias, act, y, expert_ids, sorted_ids, num_post)
    launch = _launch_dealt if deals else _launch_down
    launch(
        programs,
        (matrix_descriptor(w2, I, (tiles.down.rows, tiles.down.depth)),),
        tensors if deals else (*tensors, counters),
        (R, e, most),
        (case,),
        num_warps=tiles.down.warps,
    )
