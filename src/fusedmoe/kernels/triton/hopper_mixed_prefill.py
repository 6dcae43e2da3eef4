"""Many rows per expert on Hopper, 16-bit rows and quantized weights: two persistent GEMMs, a sum.

Weights are read as they are stored and become numbers in registers, on their way to the WGMMA. A
tile is 256 weight rows by 64 slots of one expert (a block of ``moe_align_block_size``), 192 by 128
or 128 by 256; slots that do not fill a block of 256 go to launches with tiles of 128. Four or one
producer warps fill a ring of steps of 64 columns: weights by TMA, as words of 32 bits, token
rows gathered by cp.async (up) or read as a matrix by TMA (down). Each of two to four consumer
warpgroups has 64 of the weight rows and makes numbers of them while products run on the tensor
cores, its own or the others'. A block that is not full multiplies fewer slots.

Products with numbers of four or six bits want the other operand's columns in ``lane_order``: x is
copied into y's memory first, which is not in use yet; act is written in that order.

A scale for all columns multiplies the sum. Where groups of columns share one, numbers of eight bits
in groups of at least 64 columns, and of four in at least 128, stay as they are, and the sums change
their unit from scale to scale. Elsewhere a number times its scale is rounded to bf16, which costs
nothing where the scale is a power of two and little where the number has four bits.

up_kernel    grid (programs,): x [T, H], w1 -> act [P, I], rows in the order of ``sorted_ids``; and
             position [R]: where a slot's row is.
down_kernel  grid (programs,): act [P, I], w2 -> y [P, H], rows as in act.
sum_kernel   that of ``hopper_prefill``.

Tiles are drawn from a counter, in groups of blocks that share weights in the L2. Launches for
the slots left over follow those of large blocks, and begin while these end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.column_orders import LANES
from fusedmoe.kernels.grouped_gemm_quantized import row_addresses, weight_addresses
from fusedmoe.kernels.lane_order import lane_order
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.row_steps import AS_THEY_COME, BothSteps
from fusedmoe.kernels.superblock_scales import GROUP, superblock_scales
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    kept,
    matrix_descriptor,
    task_counters,
    weight_views,
)
from fusedmoe.kernels.triton.hopper_mixed_numbers import (
    SIDE,
    STEP,
    has_minima,
    in_lane_order,
    loads_of_stage,
    words_of_step,
)
from fusedmoe.kernels.triton.hopper_mixed_prefill_common import MixedCase, room_of, unit_of
from fusedmoe.kernels.triton.hopper_mixed_prefill_down import down_kernel
from fusedmoe.kernels.triton.hopper_mixed_prefill_up import up_kernel
from fusedmoe.kernels.triton.hopper_prefill import sum_rows
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.mixed_tiles import MixedPrefillTile, MixedPrefillTiles

# Registers of a thread at launch by weight rows of a tile: the multiprocessor's, shared by its
# warpgroups.
_REGISTERS = {128: 168, 192: 128, 256: 96}

_launch_up = HopperLauncher(up_kernel)
_launch_down = HopperLauncher(down_kernel)
_case = kept(MixedCase)


def _weight_words(
    w: QuantizedTensor, tile: MixedPrefillTile
) -> tuple[TensorDescriptor, TensorDescriptor, int]:
    """``weight_views`` in words of 32 bits."""
    element = w.format.element
    words = words_of_step(element) * tile.steps // loads_of_stage(element, tile.steps)
    box = room_of(tile.rows) // 2, words
    return weight_views(w.data, w.shards, w.interleaved, box, torch.int32)


def wants_lane_order(w: QuantizedTensor) -> bool:
    """Whether products with w want the other operand's columns in ``lane_order``."""
    return bool(in_lane_order(w.format.element))


class Scales(NamedTuple):
    """What kernels know of a weight's scales: the tensors scale, zero point (or what is added to
    products with the scale) and scale2; the steps that ``weight_addresses`` has of them (experts,
    shards, rows, rows that share one); columns that share one, 0: all of them."""

    tensors: tuple[torch.Tensor | None, ...]
    steps: tuple[int, ...]
    group: int

    @classmethod
    def of(cls, w: QuantizedTensor) -> Scales:
        """The scales of ``w``. Those of e2m1 apply to numbers, not to sums."""
        if has_minima(w.format.element):
            scale, term = superblock_scales(w)
            return cls((scale, term, None), (scale.stride(0), *row_addresses(w)[2:], 1), GROUP)
        group, D = w.format.group.col, w.shape[-1]
        whole = group == -1 or (group >= D and w.format.element != "e2m1")
        stride_expert, _, *steps = weight_addresses(w)[4:]
        tensors = w.scale, w.zero_point, w.scale2
        return cls(tensors, (stride_expert, *steps), 0 if whole else group)


def _of_tile(
    w: QuantizedTensor, scales: Scales, tile: MixedPrefillTile, share: str
) -> dict[str, Any]:
    """What cases of both launches are told alike."""
    return {
        **{"ELEMENT": w.format.element, "GROUP": scales.group, "SHARE": share},
        **{"ROWS": tile.rows, "SLOTS": tile.slots, "STEPS": tile.steps},
    }


def up(
    layer: LayerTensors[QuantizedTensor],
    x: torch.Tensor,
    scales: Scales,
    position: torch.Tensor,
    tables: MoEAlignment,
    tile: MixedPrefillTile,
    share: str,
    *,
    ordered: bool,
    top_k: int,
) -> None:
    """The layer's act [P, I], its columns in ``lane_order`` if ``ordered``, and position [R], of
    rows x, of which ``top_k`` slots share one.

    ``share``: of "all" blocks or, where tables come from ``align_with_tails``, of those that are
    "large" or those that are "tails".

    Columns of x are in that order if w1 ``wants_lane_order``. ``task_counters`` says what the
    table of slots must have.
    """
    w1, act, activation = layer.w1, layer.act, layer.epilogue
    H, I = x.shape[1], act.shape[1]  # noqa: E741
    sorted_ids, expert_ids, num_post = tables
    counter = task_counters(sorted_ids, act.shape[0], 4)[share == "tails"]
    low, high, desc_rows = _weight_words(w1, tile)
    _launch_up(
        layer.programs,
        (low, high, matrix_descriptor(act, I, (unit_of(tile.slots), SIDE.value))),
        (*scales.tensors, layer.w1_bias, x, position, expert_ids, sorted_ids, num_post, counter),
        (
            x.stride(0),
            *scales.steps,
            position.shape[0],
            w1.shape[0],
            desc_rows,
            *activation.numbers,
        ),
        (
            _case(
                *(I, H, tile.stages, tile.group, activation.formula, activation.gated),
                *(w1.interleaved, top_k),
                **_of_tile(w1, scales, tile, share),
                ORDERED=ordered,
            ),
        ),
        num_warps=4,
        maxnreg=_REGISTERS[tile.rows],
    )


def down(
    layer: LayerTensors[QuantizedTensor],
    act: torch.Tensor,
    scales: Scales,
    tables: MoEAlignment,
    tile: MixedPrefillTile,
    share: str,
) -> None:
    """The layer's y [P, H], of act as it is or was rounded and tables that have served ``up``.

    Columns of act are in ``lane_order`` if w2 ``wants_lane_order``.
    """
    w2 = layer.w2
    e, H, I = w2.shape  # noqa: E741
    sorted_ids, expert_ids, num_post = tables
    counter = task_counters(sorted_ids, act.shape[0], 4)[2 + (share == "tails")]
    low, high, _ = _weight_words(w2, tile)
    stride_expert, _, row_step, block = scales.steps
    _launch_down(
        layer.programs,
        (
            low,
            high,
            matrix_descriptor(act, I, (unit_of(tile.slots), STEP.value)),
            matrix_descriptor(layer.y, H, (unit_of(tile.slots), SIDE.value)),
        ),
        (*scales.tensors, layer.w2_bias, expert_ids, sorted_ids, num_post, counter),
        (stride_expert, row_step, block, layer.topk_ids.numel(), e),
        (_case(H, I, tile.stages, tile.group, **_of_tile(w2, scales, tile, share)),),
        num_warps=4,
        maxnreg=_REGISTERS[tile.rows],
    )


def shares_of(
    tiles: MixedPrefillTiles,
) -> dict[str, tuple[MixedPrefillTile, MixedPrefillTile]]:
    """The tiles of both GEMMs for each share of the blocks, in the order of the launches."""
    both = tiles.gemm1, tiles.gemm2
    return {"all": both} if tiles.tails is None else {"large": both, "tails": tiles.tails}


def prefill(
    layer: LayerTensors[QuantizedTensor],
    tables: MoEAlignment,
    tiles: MixedPrefillTiles,
    steps: BothSteps = AS_THEY_COME,
) -> None:
    """Launch the three kernels, and what rows go through before each product; all as checked by
    ``kernels.hopper_mixed_prefill``."""
    x, w1, w2, _, topk_ids, _, act, y = layer[:8]
    position = torch.empty(topk_ids.numel(), dtype=torch.int32, device=x.device)
    orders = [LANES if wants_lane_order(w) else "" for w in (w1, w2)]
    # y is not needed before the second launch.
    if orders[0] and steps[0].none:
        rows = y.view(x.dtype).flatten()[: x.numel()].view(x.shape)
        lane_order(x, rows)
        x = rows
    routed = topk_ids, layer.expert_map
    x = steps[0].taken(x, w1, *routed, order=orders[0], room=y)
    shares, scales, top_k = shares_of(tiles), Scales.of(w1), steps[0].top_k(topk_ids.shape[1])
    for share, (tile, _) in shares.items():
        ordered = orders[1] != "" and steps[1].none
        up(layer, x, scales, position, tables, tile, share, ordered=ordered, top_k=top_k)
    act = steps[1].taken(act, w2, *routed, order=orders[1], position=position)
    scales = Scales.of(w2)
    for share, (_, tile) in shares.items():
        down(layer, act, scales, tables, tile, share)
    sum_rows(layer, position)
