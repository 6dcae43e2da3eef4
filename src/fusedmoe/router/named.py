"""The named routing functions: thin specs over ``route``."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from fusedmoe.router.functional import route
from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors, ScoreFunction


class TopkResult(NamedTuple):
    """weights fp32 [T, K], ids [T, K], and token_expert_indices int32 [T, K] = k * T + t."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    token_expert_indices: torch.Tensor


def fused_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    scoring_func: str = "softmax",
) -> TopkResult:
    """Plain top-k: gating_output [T, E] scored in fp32, the ``topk`` best, renormalized or not.

    ``scoring_func`` is softmax, sigmoid, sqrtsoftplus or identity. ``hidden_states`` [T, ...] say
    how many tokens there are, no more. ids are int32 or ``indices_type``. Raises ValueError for
    shapes, dtypes and numbers that do not fit. The functions below read these arguments alike.
    """
    spec = _spec(hidden_states, gating_output, topk, renormalize, scoring_func)
    weights, ids, _ = route(gating_output, spec, indices_dtype=indices_type)
    num_tokens = gating_output.shape[0]
    slots = torch.arange(num_tokens * topk, dtype=torch.int32, device=gating_output.device)
    return TopkResult(weights, ids, slots.view(topk, num_tokens).t().contiguous())


def fused_topk_bias(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    e_score_correction_bias: torch.Tensor | None,
    topk: int,
    renormalize: bool,
    scoring_func: str = "softmax",
    indices_type: torch.dtype | None = None,
    input_tokens: torch.Tensor | None = None,
    hash_indices_table: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> RoutingResult:
    """Top-k by score + ``e_score_correction_bias`` [E]; weights are the scores without the bias.

    With ``hash_indices_table`` int [vocab, topk] a token's experts are the row of its id in
    ``input_tokens`` int [T] instead. ``routed_scaling_factor`` multiplies the weights at the end.
    """
    scale = {"routed_scaling_factor": routed_scaling_factor}
    spec = _spec(hidden_states, gating_output, topk, renormalize, scoring_func, **scale)
    tensors = RoutingTensors(
        correction_bias=e_score_correction_bias, hash_indices_table=hash_indices_table
    )
    return route(gating_output, spec, tensors, input_ids=input_tokens, indices_dtype=indices_type)


def grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> RoutingResult:
    """Top-k within the ``topk_group`` best of ``num_expert_group`` equal groups (0: no groups).

    A group counts as much as its best expert, or with ``e_score_correction_bias`` [E] as its two
    best together; the bias is as in ``fused_topk_bias``. ids are int32.
    """
    spec = _spec(
        hidden_states,
        gating_output,
        topk,
        renormalize,
        scoring_func,
        routed_scaling_factor=routed_scaling_factor,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        group_score="max" if e_score_correction_bias is None else "top2_sum",
    )
    return route(gating_output, spec, RoutingTensors(correction_bias=e_score_correction_bias))


def fused_grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    e_score_correction_bias: torch.Tensor,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
) -> RoutingResult:
    """``grouped_topk`` with a bias, under the name that other callers know it by."""
    return grouped_topk(
        hidden_states,
        gating_output,
        topk,
        renormalize,
        num_expert_group,
        topk_group,
        scoring_func,
        routed_scaling_factor,
        e_score_correction_bias,
    )


class GroupedTopk(nn.Module):
    """``grouped_topk`` with its parameters kept, for models that own a routing module.

    ``num_fused_shared_experts`` N > 0 appends the experts E to E + N - 1 to each token's, with the
    weight ``shared_expert_weight``: weights and ids are [T, topk + N].
    """

    def __init__(
        self,
        topk: int,
        renormalize: bool,
        num_expert_group: int = 0,
        topk_group: int = 0,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        num_fused_shared_experts: int = 0,
        *,
        shared_expert_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.topk = topk
        self.renormalize = renormalize
        self.num_expert_group = num_expert_group
        self.topk_group = topk_group
        self.scoring_func = scoring_func
        self.routed_scaling_factor = routed_scaling_factor
        self.num_fused_shared_experts = num_fused_shared_experts
        self.shared_expert_weight = shared_expert_weight

    def forward(
        self,
        hidden_states: torch.Tensor,
        gating_output: torch.Tensor,
        e_score_correction_bias: torch.Tensor | None = None,
    ) -> RoutingResult:
        """hidden_states [T, H], gating_output [T, E], bias [E] -> weights fp32, ids int32."""
        spec = _spec(
            hidden_states,
            gating_output,
            self.topk,
            self.renormalize,
            self.scoring_func,
            routed_scaling_factor=self.routed_scaling_factor,
            num_expert_group=self.num_expert_group,
            topk_group=self.topk_group,
            group_score="max" if e_score_correction_bias is None else "top2_sum",
            num_fused_shared_experts=self.num_fused_shared_experts,
            shared_expert_weight=self.shared_expert_weight,
        )
        return route(gating_output, spec, RoutingTensors(correction_bias=e_score_correction_bias))


def _spec(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    **rest: Any,
) -> RoutingSpec:
    if gating_output.dim() != 2 or hidden_states.shape[:1] != gating_output.shape[:1]:
        raise ValueError(
            f"expected hidden_states [T, H] and gating_output [T, E], got "
            f"{tuple(hidden_states.shape)} and {tuple(gating_output.shape)}"
        )
    return RoutingSpec(
        top_k=topk,
        num_experts=gating_output.shape[-1],
        score_function=cast("ScoreFunction", scoring_func),
        renormalize=renormalize,
        **rest,
    )
