"""One or two tokens with both operands in 8 bits: ``hopper_direct``, whose rows are rounded on the
way.

The two launches, roles and tasks are those of ``hopper_direct``. There are so few rows that all of
their steps lie in shared memory: the consumers round them there while the first weights are on
their way. Products of 128 columns are added up in fp32 with their scales, as in
``hopper_w8a8_gemm``.
"""

from typing import NamedTuple

import torch

from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton.hopper_direct import direct_sizes
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    matrix_descriptor,
    weight_views,
)
from fusedmoe.kernels.triton.hopper_w8a8_direct_down import down_kernel
from fusedmoe.kernels.triton.hopper_w8a8_direct_up import up_kernel
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.hopper_tiles import DirectTiles

# Of the eight warps that a program has, alone on its multiprocessor.
MAX_REGISTERS = 168

_launch_up = HopperLauncher(up_kernel)
_launch_down = HopperLauncher(down_kernel)


class Rounding(NamedTuple):
    """How rows are rounded: by ``group``s of 128 columns, each ``row`` by its largest magnitude, or
    by a ``given`` scale."""

    how: str
    scale: torch.Tensor | None
    e8m0: bool


def direct(
    layer: LayerTensors[QuantizedTensor],
    roundings: tuple[Rounding, Rounding],
    tiles: DirectTiles,
) -> None:
    """Launch both kernels; the layer as checked by ``kernels.hopper_w8a8``."""
    x, w1, w2, topk_weights, topk_ids, out, act, _, programs = layer[:9]
    activation, expert_map = layer.epilogue, layer.expert_map
    (e, H, I), K = w2.shape, topk_ids.shape[1]  # noqa: E741
    R, num_mapped, slots, picks = direct_sizes(topk_ids, expert_map)
    kind = w1.shards, w1.interleaved
    low, high, desc_rows = weight_views(w1.data, *kind, (tiles.up_box, STEP.value))
    shard_step, row_step, *of_scales = weight_addresses(w1)[2:]
    _launch_up(
        programs,
        (low, high),
        (x, roundings[0].scale, w1.scale, layer.w1_bias, act, topk_ids, expert_map),
        (
            R, num_mapped, e, desc_rows, x.stride(0), *of_scales, shard_step, row_step,
            *activation.numbers,
        ),
        (
            I, H, K, roundings[0].how, *_sums(w1, roundings[0]), roundings[0].e8m0,
            activation.formula, activation.gated, slots, tiles.up_rows, tiles.up_valid, 8,
            tiles.up_stages,
        ),
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    _, row_step, *of_scales = weight_addresses(w2)[2:]
    _launch_down(
        programs,
        (matrix_descriptor(w2.data, I, (tiles.down_box, STEP.value)),),
        (
            act, roundings[1].scale, w2.scale, layer.w2_bias, topk_weights, out, topk_ids,
            expert_map,
        ),
        (out.stride(0), R, num_mapped, e, *of_scales[:2], *of_scales[3:], row_step),
        (
            H, I, K, roundings[1].how, *_sums(w2, roundings[1]), roundings[1].e8m0, slots,
            tiles.down_rows, tiles.down_rows // picks, tiles.down_valid, max(8, picks),
            tiles.down_stages,
        ),
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def _sums(w: QuantizedTensor, rounding: Rounding) -> tuple[bool, int]:
    """Whether products are added up by steps, and how many columns share a weight's scale, 0: all.

    int8 sums are exact; where rows have one scale, they run through.
    """
    columns, D = w.format.group.col, w.shape[2]
    group = columns if 0 < columns < D else 0
    return w.format.element != "int8" or group > 0 or rounding.how == "group", group
