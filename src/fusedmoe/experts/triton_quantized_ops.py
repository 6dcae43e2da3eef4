"""The quantized Triton experts as torch.compile sees them: ops that take tensors and words.

An operand is nine arguments: data, scale, second scale, zero point, groups of columns, bias, the
scale of the rows that meet it, the format in words, and the key of those rows in words. Behind both
comes the order of x's columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.experts.torch_quantized import quantized_pair
from fusedmoe.experts.triton_quantized_run import batched_quantized_experts, quantized_experts
from fusedmoe.quantization.config import FusedMoEQuantConfig, FusedMoEQuantDesc
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.keys import GroupShape, QuantKey
from fusedmoe.quantization.tensor import QuantFormat

Flat = tuple[Any, ...]


def flat(w1: torch.Tensor, w2: torch.Tensor, config: FusedMoEQuantConfig) -> Flat:
    """The operands as a custom op takes them, and no order; ``_operands_of`` is the inverse."""
    parts: list[Any] = []
    for data, weight, rows in ((w1, config.w1, config.a1), (w2, config.w2, config.a2)):
        assert weight.format is not None
        parts += [data, weight.scale, weight.scale2, weight.zp, weight.group_index, weight.bias]
        parts += [rows.scale, _format_words(weight.format), _key_words(rows.key)]
    return (*parts, None)


def flat_sorted(operands: Operands) -> Flat:
    """As ``flat``."""
    parts: list[Any] = []
    both = (
        (operands.w1, operands.w1_bias, operands.a1_scale, operands.a1),
        (operands.w2, operands.w2_bias, operands.a2_scale, operands.a2),
    )
    for w, bias, rows_scale, key in both:
        parts += [w.data, w.scale, w.scale2, w.zero_point, w.group_index, bias]
        parts += [rows_scale, _format_words(w.format), _key_words(key)]
    return (*parts, operands.order)


def _format_words(fmt: QuantFormat) -> str:
    return f"{fmt.name} {fmt.group.row} {fmt.group.col}"


def _format_of(words: str) -> QuantFormat:
    name, row, col = words.split()
    return replace(format_named(name), group=GroupShape(int(row), int(col)))


def _key_words(key: QuantKey | None) -> str:
    if key is None:
        return ""
    dtype = str(key.dtype).removeprefix("torch.")
    row, col = key.group_shape
    return f"{dtype} {int(key.static)} {row} {col} {key.scale_kind} {int(key.second_scale)}"


def _key_of(words: str) -> QuantKey | None:
    if not words:
        return None
    dtype, static, row, col, kind, second = words.split()
    known: Any = getattr(torch, dtype, dtype)
    scale_kind: Any = kind
    return QuantKey(
        known,
        static == "1",
        GroupShape(int(row), int(col)),
        scale_kind=scale_kind,
        second_scale=second == "1",
    )


def _operands_of(
    parts: Flat, activation: MoEActivation, dtype: torch.dtype, emulate: bool
) -> Operands:
    sides = []
    for data, scale, scale2, zp, index, bias, rows_scale, fmt, words in (parts[:9], parts[9:18]):
        weight = FusedMoEQuantDesc(
            dtype=data.dtype,
            scale=scale,
            scale2=scale2,
            zp=zp,
            group_index=index,
            bias=bias,
            format=_format_of(fmt),
        )
        sides.append((data, weight, _key_of(words), rows_scale))
    (w1, desc1, key1, scale1), (w2, desc2, key2, scale2) = sides
    config = FusedMoEQuantConfig(w1=desc1, w2=desc2)
    first, second = quantized_pair(w1, w2, config, activation, dtype)
    biases = desc1.bias, desc2.bias
    return Operands(first, second, key1, key2, scale1, scale2, *biases, emulate, parts[18])


@torch.library.custom_op(
    "fusedmoe::triton_quantized_experts", mutates_args=("output", "workspace13", "workspace2")
)
def standard_op(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    x_scale: torch.Tensor | None,
    w1: torch.Tensor,
    w1_scale: torch.Tensor | None,
    w1_scale2: torch.Tensor | None,
    w1_zero_point: torch.Tensor | None,
    w1_group_index: torch.Tensor | None,
    w1_bias: torch.Tensor | None,
    a1_scale: torch.Tensor | None,
    w1_format: str,
    a1_key: str,
    w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
    w2_scale2: torch.Tensor | None,
    w2_zero_point: torch.Tensor | None,
    w2_group_index: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    w2_format: str,
    a2_key: str,
    order: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    activation: str,
    clamp_limit: float | None,
    alpha: float | None,
    beta: float | None,
    situ_beta: float | None,
    situ_linear_beta: float | None,
    expert_map: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
    batch_invariant: bool,
    emulate: bool,
) -> None:
    """``quantized_experts`` as torch.compile sees it: opaque."""
    parts = (
        *(w1, w1_scale, w1_scale2, w1_zero_point, w1_group_index, w1_bias, a1_scale),
        *(w1_format, a1_key),
        *(w2, w2_scale, w2_scale2, w2_zero_point, w2_group_index, w2_bias, a2_scale),
        *(w2_format, a2_key, order),
    )
    numbers = (clamp_limit, alpha, beta, situ_beta, situ_linear_beta)
    quantized_experts(
        output,
        hidden_states,
        _operands_of(parts, MoEActivation(activation), output.dtype, emulate),
        topk_weights,
        topk_ids,
        MoEActivation(activation),
        ApplyMoEActivationConfig.from_numbers(*numbers),
        expert_map,
        workspace13,
        workspace2,
        x_scale=x_scale,
        batch_invariant=batch_invariant,
    )


@torch.library.custom_op(
    "fusedmoe::batched_triton_quantized_experts", mutates_args=("output", "workspace13")
)
def batched_op(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w1_scale: torch.Tensor | None,
    w1_scale2: torch.Tensor | None,
    w1_zero_point: torch.Tensor | None,
    w1_group_index: torch.Tensor | None,
    w1_bias: torch.Tensor | None,
    a1_scale: torch.Tensor | None,
    w1_format: str,
    a1_key: str,
    w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
    w2_scale2: torch.Tensor | None,
    w2_zero_point: torch.Tensor | None,
    w2_group_index: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    w2_format: str,
    a2_key: str,
    order: torch.Tensor | None,
    expert_num_tokens: torch.Tensor,
    activation: str,
    clamp_limit: float | None,
    alpha: float | None,
    beta: float | None,
    situ_beta: float | None,
    situ_linear_beta: float | None,
    workspace13: torch.Tensor,
    batch_invariant: bool,
    emulate: bool,
) -> None:
    """``batched_quantized_experts`` as torch.compile sees it: opaque."""
    parts = (
        *(w1, w1_scale, w1_scale2, w1_zero_point, w1_group_index, w1_bias, a1_scale),
        *(w1_format, a1_key),
        *(w2, w2_scale, w2_scale2, w2_zero_point, w2_group_index, w2_bias, a2_scale),
        *(w2_format, a2_key, order),
    )
    numbers = (clamp_limit, alpha, beta, situ_beta, situ_linear_beta)
    batched_quantized_experts(
        output,
        hidden_states,
        _operands_of(parts, MoEActivation(activation), hidden_states.dtype, emulate),
        expert_num_tokens,
        MoEActivation(activation),
        ApplyMoEActivationConfig.from_numbers(*numbers),
        workspace13,
        batch_invariant=batch_invariant,
    )


@standard_op.register_fake
def _(*arguments: object) -> None:
    return None


@batched_op.register_fake
def _(*arguments: object) -> None:
    return None
