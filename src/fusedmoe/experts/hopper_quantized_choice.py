"""Which of Hopper's own kernels can run given weights, rows and numbers of slots: whether their
loads read the tensors as they lie, and whether slots are as few as they are made for."""

from __future__ import annotations

import torch

from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.kernels.grouped_gemm_quantized import ELEMENTS, TABLES
from fusedmoe.kernels.hopper_fp8_prefill import unmet_by_prefill
from fusedmoe.kernels.hopper_mixed_prefill import MINIMA, unmet_by_mixed_prefill, wide_rows
from fusedmoe.kernels.hopper_w8a8 import STEP, unmet_by_pairs
from fusedmoe.kernels.quantized_checks import ALIGNED_BYTES, unmet_by_stream
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR
from fusedmoe.quantization.tensor import QuantFormat
from fusedmoe.tuning.cuda_tiles import EIGHT_MEAN, TABLE_MEAN
from fusedmoe.tuning.mixed_tiles import (
    MixedPrefillTiles,
    mixed_prefill_tiles,
    runs_mixed_prefill,
)

# Beyond so many slots per expert the products take longer than reading the weights.
MAX_DECODE_MEAN = 24
INT4_DECODE_MEAN = 16
# Where rows follow the columns of 8-bit weights, that takes two more launches, which soon cost more
# than streaming saves over plain Triton.
BYTES_FOLLOWED_MEAN = 0.5


def runs_decode(
    R: int, num_experts: int, operands: Operands, x: torch.Tensor, x_scale: torch.Tensor | None
) -> bool:
    """Whether the streaming kernels can run R slots over ``num_experts`` experts, local or not, and
    should; rows rounded already or not."""
    if MAX_DECODE_MEAN * num_experts < R or x.stride(1) != 1 or x.data_ptr() % ALIGNED_BYTES:
        return False
    w1, w2, a1, a2 = operands.w1, operands.w2, operands.a1, operands.a2
    if operands.emulate or operands.rows_follow:
        most = BYTES_FOLLOWED_MEAN if operands.rows_follow and w1.format.values == 1 else EIGHT_MEAN
        if most * num_experts < R or x_scale is not None:
            return False
    elif (a1 is None) != (a2 is None):
        return False
    if x_scale is not None:
        if x.dtype != w1.data.dtype or not (x.is_contiguous() and x_scale.is_contiguous()):
            return False
    elif x.dtype != torch.bfloat16:
        return False
    if operands.emulate or a1 is None or a2 is None:
        if {w1.format.element, w2.format.element} & TABLES and TABLE_MEAN * num_experts < R:
            return False
        return x.stride(0) % 8 == 0 and unmet_by_stream(w1, w2) is None
    return unmet_by_pairs((w1, a1), (w2, a2)) is None


def streams_longest(R: int, num_experts: int, operands: Operands) -> bool:
    """Whether streaming wins where prefill with rows as they are could begin: int4 becomes numbers
    in so few instructions."""
    return operands.w1.format.element == "int4" and INT4_DECODE_MEAN * num_experts >= R


def can_prefill(operands: Operands, x: torch.Tensor, x_scale: torch.Tensor | None) -> bool:
    """Whether the prefill kernels can run these weights and rows, rounded already or not."""
    a1, a2 = operands.a1, operands.a2
    if a1 is None or a2 is None or operands.emulate:
        return False
    if x_scale is None and x.dtype != torch.bfloat16:
        return False
    if x_scale is not None:
        dense_rows = x.is_contiguous() and x_scale.is_contiguous()
        if a1.group_shape.col != STEP or not dense_rows or x.data_ptr() % ALIGNED_BYTES:
            return False
    return unmet_by_prefill(operands.w1, operands.w2, (a1, a2)) is None


def can_prefill_mixed(operands: Operands, x: torch.Tensor, x_scale: torch.Tensor | None) -> bool:
    """Whether the prefill kernels can run these weights with rows in floating point, as they come
    or rounded to a format."""
    if not operands.floating_rows or x_scale is not None:
        return False
    if FP8_DYNAMIC_TENSOR in (operands.a1, operands.a2):  # which rows count is not known here
        return False
    if x.dtype != torch.bfloat16 or x.stride(1) != 1:
        return False
    if x.data_ptr() % ALIGNED_BYTES or x.stride(0) % ALIGNED_BYTES:
        return False
    return unmet_by_mixed_prefill(operands.w1, operands.w2) is None


def mixed_tiles_for(R: int, num_experts: int, *formats: QuantFormat) -> MixedPrefillTiles | None:
    """Tiles of the prefill kernels for rows as they are, R slots over ``num_experts``
    experts, local or not, and w1 and w2 of these formats; None where slots are too few."""
    streams = all(fmt.element in ELEMENTS for fmt in formats)
    minima = any(fmt.element in MINIMA for fmt in formats)
    if not runs_mixed_prefill(R, num_experts, streams=streams, minima=minima):
        return None
    bits = formats[0].bits, formats[1].bits
    return mixed_prefill_tiles(R, num_experts, bits, costly=not streams, wide=wide_rows(*formats))
