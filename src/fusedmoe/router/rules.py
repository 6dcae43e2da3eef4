"""The rules of model families whose routing is more than score, choose, renormalize.

Each ``*_spec`` makes the ``RoutingSpec`` of a family; each ``*_routing`` is (or makes) a custom
routing function, ``(hidden_states, gating_output, topk, renormalize) -> (weights, ids)``.
"""

from __future__ import annotations

from typing import Literal

import torch

from fusedmoe.router.functional import route
from fusedmoe.router.routers import CustomRoutingFunction
from fusedmoe.router.spec import RoutingSpec, RoutingTensors


def llama4_spec(top_k: int, num_experts: int) -> RoutingSpec:
    """Choose logits, weight by their sigmoid (the layer applies the weight to the input)."""
    return RoutingSpec(
        top_k=top_k, num_experts=num_experts, score_function="sigmoid", score_after_topk=True
    )


def gpt_oss_spec(top_k: int, num_experts: int) -> RoutingSpec:
    """Choose logits, softmax over the chosen."""
    return RoutingSpec(top_k=top_k, num_experts=num_experts, score_after_topk=True)


def cohere2_spec(
    top_k: int,
    num_experts: int,
    renormalize: bool = False,
    score_function: Literal["sigmoid", "softmax"] = "sigmoid",
) -> RoutingSpec:
    """Choose logits; weight by their sigmoid (renormalized or not) or a softmax over the chosen."""
    return RoutingSpec(
        top_k=top_k,
        num_experts=num_experts,
        score_function=score_function,
        score_after_topk=True,
        renormalize=renormalize and score_function == "sigmoid",
    )


def gemma4_spec(top_k: int, num_experts: int) -> RoutingSpec:
    """Softmax, renormalized; to be used with ``RoutingTensors(per_expert_scale=...)``."""
    return RoutingSpec(top_k=top_k, num_experts=num_experts, renormalize=True)


def phimoe_spec(num_experts: int, jitter_epsilon: float = 0.01) -> RoutingSpec:
    """Sparsemixer: two rounds, each weighted by a softmax over the experts near the best one."""
    return RoutingSpec(
        top_k=2,
        num_experts=num_experts,
        selection="sparsemixer",
        sparsemixer_epsilon=jitter_epsilon,
    )


def interns1_pro_spec(
    top_k: int, num_experts: int, num_groups: int, renormalize: bool = True
) -> RoutingSpec:
    """Softmax over all experts, then the best K/G of each of G groups."""
    return RoutingSpec(
        top_k=top_k,
        num_experts=num_experts,
        selection="topk_per_group",
        num_expert_group=num_groups,
        topk_group=num_groups,
        renormalize=renormalize,
    )


def grok_spec(top_k: int, num_experts: int, logit_softcap: float = 30.0) -> RoutingSpec:
    """Softmax over tanh-capped logits, not renormalized."""
    return RoutingSpec(top_k=top_k, num_experts=num_experts, logit_softcap=logit_softcap)


def dbrx_spec(top_k: int, num_experts: int, normalize_p: float | None = 1.0) -> RoutingSpec:
    """Softmax, divided by the p-norm of the chosen weights (None: not divided)."""
    return RoutingSpec(
        top_k=top_k,
        num_experts=num_experts,
        renormalize=normalize_p is not None,
        renormalize_norm=normalize_p or 1.0,
    )


def ernie_spec(top_k: int, num_experts: int, norm_min: float = 1e-12) -> RoutingSpec:
    """Softmax, bias for the choice, divided by the sum but by no less than ``norm_min``."""
    return RoutingSpec(
        top_k=top_k, num_experts=num_experts, renormalize=True, renormalize_floor=norm_min
    )


def deepseek_v2_spec(
    top_k: int,
    num_experts: int,
    routed_scaling_factor: float = 1.0,
    num_expert_group: int = 0,
    topk_group: int = 0,
) -> RoutingSpec:
    """Softmax, groups ranked by their best expert, scaled, not renormalized."""
    return RoutingSpec(
        top_k=top_k,
        num_experts=num_experts,
        routed_scaling_factor=routed_scaling_factor,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
    )


def deepseek_v3_spec(
    top_k: int,
    num_experts: int,
    routed_scaling_factor: float = 1.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
) -> RoutingSpec:
    """Sigmoid, bias for the choice, groups ranked by their two best, renormalized, scaled."""
    return RoutingSpec(
        top_k=top_k,
        num_experts=num_experts,
        score_function="sigmoid",
        renormalize=renormalize,
        renormalize_epsilon=1e-20,
        routed_scaling_factor=routed_scaling_factor,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        group_score="top2_sum",
    )


def deepseek_v4_spec(
    top_k: int, num_experts: int, routed_scaling_factor: float = 1.0, image_sentinel_lo: int = 0
) -> RoutingSpec:
    """sqrt(softplus), bias (or a hash table) for the choice, renormalized, scaled."""
    return RoutingSpec(
        top_k=top_k,
        num_experts=num_experts,
        score_function="sqrtsoftplus",
        renormalize=True,
        renormalize_epsilon=1e-20,
        routed_scaling_factor=routed_scaling_factor,
        image_sentinel_lo=image_sentinel_lo,
    )


def longcat_spec(
    top_k: int, num_experts: int, num_zero_experts: int, routed_scaling_factor: float = 1.0
) -> RoutingSpec:
    """Softmax over real and identity experts, bias for the choice, scaled, not renormalized."""
    return RoutingSpec(
        top_k=top_k,
        num_experts=num_experts,
        num_zero_experts=num_zero_experts,
        routed_scaling_factor=routed_scaling_factor,
    )


def llama4_routing(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama 4 as a custom routing function; it has no renormalization to switch on."""
    _reject_renormalize("llama4_routing", renormalize)
    return route(gating_output, llama4_spec(topk, gating_output.shape[1]))[:2]


def cohere2_routing(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cohere 2 (sigmoid) as a custom routing function."""
    return route(gating_output, cohere2_spec(topk, gating_output.shape[1], renormalize))[:2]


def gemma4_routing(per_expert_scale: torch.Tensor) -> CustomRoutingFunction:
    """Gemma 4 as a custom routing function, with its scales [E]; it always renormalizes."""
    tensors = RoutingTensors(per_expert_scale=per_expert_scale)

    def routing(
        hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return route(gating_output, gemma4_spec(topk, gating_output.shape[1]), tensors)[:2]

    return routing


def phimoe_routing(jitter_epsilon: float = 0.01) -> CustomRoutingFunction:
    """Phi-MoE's sparsemixer as a custom routing function (top-2, not renormalized)."""

    def routing(
        hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _reject_renormalize("phimoe_routing", renormalize)
        if topk != 2:
            raise ValueError(f"sparsemixer chooses 2 experts, got topk {topk}")
        return route(gating_output, phimoe_spec(gating_output.shape[1], jitter_epsilon))[:2]

    return routing


def interns1_pro_routing(num_groups: int) -> CustomRoutingFunction:
    """InternS1-Pro as a custom routing function over ``num_groups`` groups."""

    def routing(
        hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spec = interns1_pro_spec(topk, gating_output.shape[1], num_groups, renormalize)
        return route(gating_output, spec)[:2]

    return routing


def _reject_renormalize(name: str, renormalize: bool) -> None:
    if renormalize:
        raise ValueError(f"{name} does not renormalize; pass renormalize=False")
