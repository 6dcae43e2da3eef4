"""Many rows per expert on Hopper, both operands in 8 bits: two persistent GEMMs and a sum.

As ``hopper_prefill``: tiles of 128 rows of one expert by 2 x 128 weight rows, producer warps that
fill a ring, two consumer warpgroups of 64 rows each, tiles in groups that share weights in the L2.
A step is 128 columns of one byte. The rows of act stay in the order of ``sorted_ids``. Scales that
change from step to step come through the ring, and what an epilogue needs is asked for before the
products: a consumer waits for no load.

up_kernel    grid (programs,): x [T, H] in 8 bits with its scales, w1 -> act [P, I]; and position
             [R]. act is rounded to 8 bits in the epilogue, with own scales [I / 128, P] or a given
             one. int8 with a scale per row leaves it 16-bit, unless ``tiles.finely``.
round_kernel grid (P / ROWS,): such rows of act -> int8 with their scales.
down_kernel  grid (programs,): act in 8 bits with its scales, w2 -> y [P, H].
sum_kernel   that of ``hopper_prefill``.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.align_arrivals import Arrivals
from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.kernels.hopper_fp8_prefill import rounds_by_tile
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.peer_layout import PeerSums, taker_of_picks
from fusedmoe.kernels.quantize import STORED, QuantizedRows, quantize_rows
from fusedmoe.kernels.triton.hopper_arrivals import arrival_arguments
from fusedmoe.kernels.triton.hopper_fp8_prefill_common import BytesCase
from fusedmoe.kernels.triton.hopper_fp8_prefill_down import down_kernel
from fusedmoe.kernels.triton.hopper_fp8_prefill_multiply import STEP
from fusedmoe.kernels.triton.hopper_fp8_prefill_up import up_kernel
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    kept,
    matrix_descriptor,
    task_counters,
    weight_views,
)
from fusedmoe.kernels.triton.hopper_prefill import sum_rows
from fusedmoe.kernels.triton.hopper_prefill_common import BLOCK_M, TILE_N
from fusedmoe.kernels.triton.hopper_pushed import push_arguments
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.kernels.triton.quantize import quantized, scale_of
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedPrefillTiles


@triton.jit(do_not_specialize=["R"])
def round_kernel(
    act_ptr,
    q_ptr,
    scale_ptr,
    sorted_ptr,
    R,
    I,  # noqa: E741
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """act [P, I] -> q int8 [P, I], scale fp32 [P], of the rows that slots have."""
    # The tables were complete before up_kernel let this launch begin.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = tl.load(sorted_ptr + row, cache_modifier=".cg") < R
    follow_previous(CHAINED)
    if tl.max(live.to(tl.int32)) == 0:
        return
    column = tl.arange(0, BLOCK)[None, :]
    at, there = row[:, None] * I + column, live[:, None] & (column < I)
    act = tl.load(act_ptr + at, there, 0.0).to(tl.float32)
    scale = scale_of(act, 1, q_ptr.dtype.element_ty, False)
    tl.store(scale_ptr + row, scale, live)
    tl.store(q_ptr + at, quantized(act, scale[:, None], q_ptr.dtype.element_ty), there)


_launch_up = HopperLauncher(up_kernel)
_launch_down = HopperLauncher(down_kernel)
_case = kept(BytesCase)
_launch_round = Launcher(round_kernel, chained=True)
_ROUNDED_AT_ONCE = 4096  # elements of act


def _steps_per_scale(w: QuantizedTensor) -> int:
    """Steps that share a scale; 0: all of them."""
    return max(w.format.group.col, 0) // STEP.value


def _by_feature(w: QuantizedTensor) -> bool:
    """Whether each weight row has a scale, rather than all of a shard one."""
    return w.scale is not None and w.scale.dim() == 3


def prefill(
    layer: LayerTensors[QuantizedTensor],
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    tables: MoEAlignment,
    tiles: QuantizedPrefillTiles,
    x_scale: torch.Tensor | None = None,
    arrivals: Arrivals | None = None,
    room: QuantizedRows | None = None,
) -> None:
    """Launch everything behind the alignment; as checked by ``kernels.hopper_fp8_prefill``.
    ``room`` for rounded x was had before the alignment."""
    x, topk_ids = layer.x, layer.topk_ids
    if x_scale is None:
        rows = quantize_rows(x, keys[0], scales[0], beside=room)
    else:
        rows = QuantizedRows(x, x_scale)
    position = torch.empty(topk_ids.numel(), dtype=torch.int32, device=x.device)
    act = up(layer, rows, position, keys[1], scales[1], tables, tiles, arrivals)
    taker = taker_of_picks(layer.out)
    down(layer, act, tables, tiles, taker)
    if taker is not None:
        taker.sent = taker.pushed = True
        return
    sum_rows(layer, position)


def up(
    layer: LayerTensors[QuantizedTensor],
    rows: QuantizedRows,
    position: torch.Tensor,
    key: QuantKey,
    scale: torch.Tensor | None,
    tables: MoEAlignment,
    tiles: QuantizedPrefillTiles,
    arrivals: Arrivals | None = None,
) -> QuantizedRows:
    """The first product, of the layer's x as ``rows`` have it: act [P, I] as ``key`` says and its
    scales: one, [P], or [I / 128, P]. The layer's act is where it is put, or the first half."""
    w1, act, activation = layer.w1, layer.act, layer.epilogue
    (P, I), H = act.shape, rows.data.shape[1]  # noqa: E741
    own, rounded = rounds_by_tile(key, tiles), act
    if own or key.static:
        rounded = act.view(STORED[key.dtype]).view(-1)[: P * I].view(P, I)
        out_desc = matrix_descriptor(rounded, I, (tiles.box, STEP.value))
    else:
        out_desc = matrix_descriptor(act, I, (tiles.box, TILE_N.value // 2))
    act_scale = scale
    if own:
        act_scale = torch.empty(-(-I // STEP.value), P, dtype=torch.float32, device=act.device)
    kind = w1.shards, w1.interleaved
    low, high, desc_rows = weight_views(w1.data, *kind, (TILE_N.value, STEP.value))
    waits, waiting, world = arrival_arguments(arrivals)
    _launch_up(
        layer.programs,
        (low, high, out_desc),
        (
            *(layer.w1_bias, *rows, w1.scale, act_scale, position, *_read(tables)),
            task_counters(tables.sorted_ids, P)[0],
            *waits,
        ),
        (
            0 if rows.scale.numel() == 1 else rows.scale.stride(0),
            *weight_addresses(w1)[4:],
            P,
            position.shape[0],
            w1.shape[0],
            desc_rows,
            *waiting,
            *activation.numbers,
        ),
        (
            _case(
                *(I, H, tiles.stages, tiles.group, activation.formula, activation.gated),
                *(w1.interleaved, layer.topk_ids.shape[1], world),
                STEPPED=_steps_per_scale(w1) > 0,
                PROMOTED=tiles.promoted[0],
                PER_SCALE=_steps_per_scale(w1),
                BY_FEATURE=_by_feature(w1),
                OWN=own,
                E8M0=key.scale_kind == "e8m0",
            ),
        ),
        num_warps=4,
        maxnreg=168,
    )
    if own:
        assert act_scale is not None
        return QuantizedRows(rounded, act_scale)
    if act_scale is None:
        return _round_rows(act, tables.sorted_ids, position.shape[0])
    return QuantizedRows(rounded, act_scale)


def _round_rows(act: torch.Tensor, sorted_ids: torch.Tensor, R: int) -> QuantizedRows:
    P, I = act.shape  # noqa: E741
    q = torch.empty(P, I, dtype=torch.int8, device=act.device)
    scale = torch.empty(P, dtype=torch.float32, device=act.device)
    block = power_of_2(I)
    rows = min(max(_ROUNDED_AT_ONCE // block, 1), BLOCK_M.value)
    warps = max(4, min(16, block // 1024))
    _launch_round((P // rows, 1), (act, q, scale, sorted_ids), (R, I), (rows, block), warps)
    return QuantizedRows(q, scale)


def down(
    layer: LayerTensors[QuantizedTensor],
    act: QuantizedRows,
    tables: MoEAlignment,
    tiles: QuantizedPrefillTiles,
    taker: PeerSums | None = None,
) -> None:
    """The second product, of act as it was rounded: y [P, H], or rows that go to ``taker``."""
    w2, P = layer.w2, act.data.shape[0]
    e, H, I = w2.shape  # noqa: E741
    stride_se, stride_sn, _, row_step, block = weight_addresses(w2)[4:]
    own = act.scale.dim() == 2
    bases, pushing = push_arguments(taker)
    _launch_down(
        layer.programs,
        (
            matrix_descriptor(act.data, I, (tiles.box, STEP.value)),
            matrix_descriptor(w2.data, I, (2 * TILE_N.value, STEP.value)),
            matrix_descriptor(layer.y, H, (tiles.box, TILE_N.value // 2)),
        ),
        (
            *(layer.w2_bias, act.scale, w2.scale, *_read(tables)),
            task_counters(tables.sorted_ids, P)[1],
            *bases,
        ),
        (
            *(0 if act.scale.numel() == 1 else 1, P // BLOCK_M.value),
            *(stride_se, stride_sn, row_step, block, layer.topk_ids.numel(), e, *pushing),
        ),
        (
            _case(
                *(H, I, tiles.stages, tiles.group),
                STEPPED=own,
                PROMOTED=tiles.promoted[1],
                PER_SCALE=_steps_per_scale(w2),
                BY_FEATURE=_by_feature(w2),
            ),
        ),
        num_warps=4,
        maxnreg=168,
    )


def _read(tables: MoEAlignment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tables.expert_ids, tables.sorted_ids, tables.num_tokens_post_pad
