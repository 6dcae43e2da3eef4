"""The experts on deep_gemm with arguments that an op's schema can hold; the ops are opaque to
torch.compile. Shapes as in ``deep_gemm_run``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.deep_gemm_run import BlockWeights, batched_experts, standard_experts


def standard(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    scale: torch.Tensor | None,
    w1: torch.Tensor,
    w1_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    e8m0: bool,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    numbers: Sequence[float],
    expert_map: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
) -> None:
    """``standard_experts``."""
    standard_experts(
        output,
        hidden_states,
        scale,
        BlockWeights(w1, w1_scale, w2, w2_scale, e8m0),
        topk_weights,
        topk_ids,
        MoEActivation(activation),
        ApplyMoEActivationConfig.from_numbers(numbers),
        expert_map,
        workspace13,
        workspace2,
    )


def batched(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    scale: torch.Tensor | None,
    w1: torch.Tensor,
    w1_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    e8m0: bool,
    counts: torch.Tensor,
    expected_rows: int,
    activation: str,
    numbers: Sequence[float],
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
) -> None:
    """``batched_experts``."""
    batched_experts(
        output,
        hidden_states,
        scale,
        BlockWeights(w1, w1_scale, w2, w2_scale, e8m0),
        counts,
        expected_rows,
        MoEActivation(activation),
        ApplyMoEActivationConfig.from_numbers(numbers),
        workspace13,
        workspace2,
    )


_WRITTEN = ("output", "workspace13", "workspace2")
standard_op = torch.library.custom_op(
    "fusedmoe::deep_gemm_experts", standard, mutates_args=_WRITTEN
)
batched_op = torch.library.custom_op(
    "fusedmoe::batched_deep_gemm_experts", batched, mutates_args=_WRITTEN
)


@standard_op.register_fake
def _(*arguments: object) -> None:
    return None


@batched_op.register_fake
def _(*arguments: object) -> None:
    return None
