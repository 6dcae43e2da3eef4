"""The quantized Triton experts as torch.compile sees them: ops that take tensors and words.

What describes the weights and the rows that meet them is ``tensors_and_words`` of a quant config;
``tables`` are those of ``Operands`` that say where columns lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.act_order import as_they_lie
from fusedmoe.experts.quantized_operands import Operands, config_of
from fusedmoe.experts.triton_quantized_run import batched_quantized_experts, quantized_experts
from fusedmoe.quantization.config import FusedMoEQuantConfig


def _operands(
    config: FusedMoEQuantConfig,
    w1: torch.Tensor,
    w2: torch.Tensor,
    activation: MoEActivation,
    dtype: torch.dtype,
    emulate: bool,
    tables: Sequence[torch.Tensor | None],
) -> Operands:
    found = Operands.of(config, w1, w2, activation, dtype, emulate=emulate)
    order, down_order, places = tables
    return as_they_lie(replace(found, order=order, down_order=down_order, places=places))


@torch.library.custom_op(
    "fusedmoe::triton_quantized_experts", mutates_args=("output", "workspace13", "workspace2")
)
def standard_op(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    x_scale: torch.Tensor | None,
    w1: torch.Tensor,
    w2: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    words: str,
    tables: Sequence[torch.Tensor | None],
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    activation: str,
    numbers: Sequence[float],
    expert_map: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
    batch_invariant: bool,
    emulate: bool,
) -> None:
    """``quantized_experts`` as torch.compile sees it: opaque."""
    config, act = config_of(tensors, words), MoEActivation(activation)
    quantized_experts(
        output,
        hidden_states,
        _operands(config, w1, w2, act, output.dtype, emulate, tables),
        topk_weights,
        topk_ids,
        act,
        ApplyMoEActivationConfig.from_numbers(numbers),
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
    w2: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    words: str,
    tables: Sequence[torch.Tensor | None],
    expert_num_tokens: torch.Tensor,
    activation: str,
    numbers: Sequence[float],
    workspace13: torch.Tensor,
    batch_invariant: bool,
    emulate: bool,
) -> None:
    """``batched_quantized_experts`` as torch.compile sees it: opaque."""
    config, act = config_of(tensors, words), MoEActivation(activation)
    batched_quantized_experts(
        output,
        hidden_states,
        _operands(config, w1, w2, act, hidden_states.dtype, emulate, tables),
        expert_num_tokens,
        act,
        ApplyMoEActivationConfig.from_numbers(numbers),
        workspace13,
        batch_invariant=batch_invariant,
    )


@standard_op.register_fake
def _(*arguments: object) -> None:
    return None


@batched_op.register_fake
def _(*arguments: object) -> None:
    return None
