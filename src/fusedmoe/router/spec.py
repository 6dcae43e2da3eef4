"""What a routing rule is, as data: one record covers every family, named routers are thin specs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus", "identity"]
GroupScore = Literal["max", "top2_sum"]
SelectionRule = Literal["topk", "sparsemixer", "topk_per_group"]

# Rows whose token id lies in [image_sentinel_lo, image_sentinel_lo + this) are image rows.
NUM_VISION_TOKEN_IDS = 5


class RoutingResult(NamedTuple):
    """Weights fp32 [T, K] and ids [T, K]; id -1 (weight 0) is a slot that carries nothing.

    ``zero_expert_weight`` fp32 [T]: what the identity (zero) experts contribute, as the factor of
    the token's own hidden state; None where the rule has none.
    """

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    zero_expert_weight: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """logits [T, E] -> RoutingResult, in this order, all of it in fp32:

    softcap -> score -> (+ bias, for the choice alone) -> keep the best groups -> choose K
    -> gather the unbiased score -> renormalize -> scale -> per-expert scale
    -> zero experts out -> fused shared experts appended.

    ``score_after_topk`` scores the chosen logits only (top-k -> softmax or sigmoid).
    ``renormalize`` divides by max(p-norm + epsilon, floor), p = ``renormalize_norm``; a
    denominator of zero or less becomes 1.
    ``num_expert_group``/``topk_group`` (0: no groups) keep the best groups before the choice.
    ``topk_per_group`` chooses K/G in each group, in the order of the groups (InternS1-Pro).
    A score that is NaN or infinite counts as 0; with ``score_after_topk``, where logits are
    compared, such a logit cannot be chosen. Neither can a choice of -inf (or a NaN bias).
    ``sparsemixer_epsilon`` is Phi-MoE's jitter epsilon, ``logit_softcap`` Grok's tanh cap.
    ``num_zero_experts`` counts the identity experts behind the E real ones in the logits.
    """

    top_k: int
    num_experts: int
    score_function: ScoreFunction = "softmax"
    score_after_topk: bool = False
    selection: SelectionRule = "topk"
    renormalize: bool = False
    renormalize_epsilon: float = 0.0
    renormalize_floor: float = 0.0
    renormalize_norm: float = 1.0
    routed_scaling_factor: float = 1.0
    num_expert_group: int = 0
    topk_group: int = 0
    group_score: GroupScore = "max"
    logit_softcap: float = 0.0
    sparsemixer_epsilon: float = 0.01
    num_zero_experts: int = 0
    num_fused_shared_experts: int = 0
    shared_expert_weight: float = 1.0
    image_sentinel_lo: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("score_function", self.score_function, get_args(ScoreFunction)),
            ("group_score", self.group_score, get_args(GroupScore)),
            ("selection", self.selection, get_args(SelectionRule)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")
        candidates = self.num_experts + self.num_zero_experts
        if not 1 <= self.top_k <= candidates:
            raise ValueError(f"top_k {self.top_k} does not lie in [1, {candidates}] experts")
        groups = self.num_expert_group
        if groups:
            if candidates % groups:
                raise ValueError(f"{candidates} experts do not divide into {groups} groups")
            if not 1 <= self.topk_group <= groups:
                raise ValueError(f"topk_group {self.topk_group} does not lie in [1, {groups}]")
        elif self.topk_group not in (0, 1):
            raise ValueError(f"topk_group {self.topk_group} of no groups")
        if self.selection == "sparsemixer" and (self.top_k != 2 or candidates < 2 or groups):
            raise ValueError(
                f"sparsemixer chooses 2 of at least 2 ungrouped experts, got top_k {self.top_k}, "
                f"{candidates} experts, {groups} groups"
            )
        if self.selection == "topk_per_group":
            if not groups or self.top_k % groups:
                raise ValueError(f"top_k {self.top_k} does not divide into {groups} groups")
            if self.topk_group != groups:
                raise ValueError(
                    f"topk_per_group keeps all {groups} groups, topk_group is {self.topk_group}"
                )
        for name in (
            "num_zero_experts",
            "num_fused_shared_experts",
            "logit_softcap",
            "sparsemixer_epsilon",
            "renormalize_epsilon",
            "renormalize_floor",
            "image_sentinel_lo",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not math.isfinite(self.routed_scaling_factor):
            raise ValueError(f"routed_scaling_factor is {self.routed_scaling_factor}")
        if not self.renormalize_norm > 0:
            raise ValueError(f"renormalize_norm must be positive, got {self.renormalize_norm}")


@dataclass(frozen=True, kw_only=True)
class RoutingTensors:
    """The tensors a rule may need beside the logits.

    correction_bias [E + Z], per_expert_scale [E], hash_indices_table [vocab, K] (ids by token id),
    vision_bias [E] (the bias of rows whose token id lies in [lo, lo + 5), lo > 0).
    """

    correction_bias: torch.Tensor | None = None
    per_expert_scale: torch.Tensor | None = None
    hash_indices_table: torch.Tensor | None = None
    vision_bias: torch.Tensor | None = None

    def check(self, spec: RoutingSpec) -> None:
        """Raise ValueError where a tensor does not fit the rule."""
        candidates = spec.num_experts + spec.num_zero_experts
        for name, length in (
            ("correction_bias", candidates),
            ("per_expert_scale", spec.num_experts),
            ("vision_bias", candidates),
        ):
            tensor: torch.Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tensor.numel() != length or tensor.shape[-1] != length:
                raise ValueError(f"{name} must be [{length}], got {tuple(tensor.shape)}")
            if not tensor.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        table = self.hash_indices_table
        if table is not None:
            if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] != spec.top_k:
                raise ValueError(
                    f"hash_indices_table must be [vocab, {spec.top_k}], got {tuple(table.shape)}"
                )
            if table.is_floating_point() or table.dtype is torch.bool:
                raise ValueError(f"hash_indices_table must hold integers, got {table.dtype}")
        biased = self.correction_bias is not None or self.vision_bias is not None
        if spec.selection == "sparsemixer" and (biased or table is not None):
            raise ValueError("sparsemixer takes no bias and no hash table")
