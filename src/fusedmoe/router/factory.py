"""``create_fused_moe_router``: the router for the arguments that a layer is given."""

from __future__ import annotations

from typing import cast

import torch

from fusedmoe.router.base import BaseRouter, EplbState
from fusedmoe.router.routers import CustomRouter, CustomRoutingFunction, SpecRouter
from fusedmoe.router.spec import RoutingSpec, RoutingTensors, ScoreFunction


def create_fused_moe_router(
    top_k: int,
    global_num_experts: int,
    renormalize: bool = True,
    use_grouped_topk: bool = False,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    scoring_func: str = "softmax",
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
    custom_routing_function: CustomRoutingFunction | None = None,
    eplb_state: EplbState | None = None,
    zero_expert_type: str | None = None,
    num_logical_experts: int | None = None,
    hash_indices_table: torch.Tensor | None = None,
    bias_vl: torch.Tensor | None = None,
    image_sentinel_lo: int = 0,
    skip_padding: bool = False,
) -> BaseRouter:
    """A router from the arguments of a layer.

    The logits cover the ``num_logical_experts`` experts of the model (default: all
    ``global_num_experts``) and, with ``zero_expert_type="identity"``, as many identity experts as
    ``e_score_correction_bias`` has entries beyond them. A ``custom_routing_function`` replaces the
    rule, so nothing that only a rule uses may come with it. ``num_expert_group`` and
    ``topk_group`` count with ``use_grouped_topk`` alone. With ``skip_padding`` every call must
    bring ``is_padding``.

    Raises ValueError for arguments that contradict each other.
    """
    num_experts = global_num_experts if num_logical_experts is None else num_logical_experts
    tensors = RoutingTensors(
        correction_bias=e_score_correction_bias,
        hash_indices_table=hash_indices_table,
        vision_bias=bias_vl,
    )
    if use_grouped_topk and (num_expert_group is None or topk_group is None):
        raise ValueError(
            "use_grouped_topk needs num_expert_group and topk_group, got "
            f"{num_expert_group} and {topk_group}"
        )
    groups = (num_expert_group or 0, topk_group or 0) if use_grouped_topk else (0, 0)
    router: BaseRouter
    if custom_routing_function is not None:
        given = (zero_expert_type, e_score_correction_bias, hash_indices_table, bias_vl)
        if max(groups) > 1 or any(argument is not None for argument in given):
            raise ValueError(
                "a custom_routing_function excludes groups, zero experts, biases and hash tables"
            )
        router = CustomRouter(
            custom_routing_function,
            top_k,
            num_experts,
            renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor,
            num_fused_shared_experts=num_fused_shared_experts,
            shared_expert_weight=shared_expert_weight,
            require_padding_mask=skip_padding,
        )
    else:
        spec = RoutingSpec(
            top_k=top_k,
            num_experts=num_experts,
            score_function=cast("ScoreFunction", scoring_func),
            renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor,
            num_expert_group=groups[0],
            topk_group=groups[1],
            group_score="max" if e_score_correction_bias is None else "top2_sum",
            num_zero_experts=count_zero_experts(
                zero_expert_type, e_score_correction_bias, num_experts
            ),
            num_fused_shared_experts=num_fused_shared_experts,
            shared_expert_weight=shared_expert_weight,
            image_sentinel_lo=image_sentinel_lo,
        )
        router = SpecRouter(spec, tensors, require_padding_mask=skip_padding)
    if eplb_state is not None:
        router.set_eplb_state(**vars(eplb_state))
    return router


def count_zero_experts(
    zero_expert_type: str | None, bias: torch.Tensor | None, num_experts: int
) -> int:
    """How many experts ``bias`` [E + Z] has beyond E; ValueError where that makes no sense."""
    if zero_expert_type is None:
        return 0
    if zero_expert_type != "identity":
        raise ValueError(f"zero_expert_type {zero_expert_type!r} is not 'identity'")
    if bias is None or bias.numel() <= num_experts:
        covered = 0 if bias is None else bias.numel()
        raise ValueError(
            "zero experts need an e_score_correction_bias that covers them: it has "
            f"{covered} entries for {num_experts} real experts"
        )
    return bias.numel() - num_experts
