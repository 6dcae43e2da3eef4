"""A layer's arguments that describe its routing: none of them may go without effect."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.router.base import FusedMoERouter
from fusedmoe.router.factory import count_zero_experts, create_fused_moe_router
from fusedmoe.router.routers import CustomRoutingFunction


@dataclass(frozen=True, kw_only=True)
class RoutingArguments:
    """As ``FusedMoE`` takes them; with ``scale_on_output`` the layer scales, not the router."""

    top_k: int
    num_experts: int
    renormalize: bool
    use_grouped_topk: bool
    num_expert_group: int | None
    topk_group: int | None
    scoring_func: str
    n_shared_experts: int
    routed_scaling_factor: float
    scale_on_output: bool
    e_score_correction_bias: torch.Tensor | None
    custom_routing_function: CustomRoutingFunction | None
    zero_expert_type: str | None
    hash_indices_table: torch.Tensor | None
    bias_vl: torch.Tensor | None
    image_sentinel_lo: int
    skip_padding: bool

    @property
    def num_logits(self) -> int:
        """Columns of the router's logits."""
        return self.num_experts + self.num_zero_experts

    @property
    def num_zero_experts(self) -> int:
        bias = self.e_score_correction_bias
        return count_zero_experts(self.zero_expert_type, bias, self.num_experts)

    def make_router(self, given: FusedMoERouter | None) -> FusedMoERouter:
        """``given`` where the caller has one (the rest must then be at its defaults)."""
        if given is not None:
            if not hasattr(given, "select_experts"):
                raise ValueError(f"router is a {type(given).__name__}, which has no select_experts")
            self._refuse(f"beside the given {type(given).__name__}", self._rule())
            return given
        if self.custom_routing_function is not None:
            own = ("renormalize", "routed_scaling_factor", "custom_routing_function")
            rule = {name: value for name, value in self._rule().items() if name not in own}
            self._refuse("beside custom_routing_function", rule)
        if not self.use_grouped_topk:
            groups = {"num_expert_group": self.num_expert_group, "topk_group": self.topk_group}
            self._refuse("without use_grouped_topk", groups)
        elif self.zero_expert_type is not None:
            self._refuse("with zero experts", {"use_grouped_topk": True})
        if self.bias_vl is None and self.image_sentinel_lo:
            self._refuse("without bias_vl", {"image_sentinel_lo": self.image_sentinel_lo})
        scale = self.routed_scaling_factor
        if not math.isfinite(scale) or (self.scale_on_output and scale == 0):
            raise ValueError(f"routed_scaling_factor {scale} leaves no output")
        return create_fused_moe_router(
            self.top_k,
            self.num_experts,
            self.renormalize,
            self.use_grouped_topk,
            self.num_expert_group,
            self.topk_group,
            self.scoring_func,
            num_fused_shared_experts=self.n_shared_experts,
            shared_expert_weight=1.0 / scale if self.scale_on_output else 1.0,
            routed_scaling_factor=1.0 if self.scale_on_output else scale,
            e_score_correction_bias=self.e_score_correction_bias,
            custom_routing_function=self.custom_routing_function,
            zero_expert_type=self.zero_expert_type,
            hash_indices_table=self.hash_indices_table,
            bias_vl=self.bias_vl,
            image_sentinel_lo=self.image_sentinel_lo,
            skip_padding=self.skip_padding,
        )

    def _rule(self) -> dict[str, Any]:
        """What was asked for beyond the defaults (None: nothing)."""
        return {
            "custom_routing_function": self.custom_routing_function,
            "renormalize": None if self.renormalize else False,
            "use_grouped_topk": self.use_grouped_topk or None,
            "num_expert_group": self.num_expert_group,
            "topk_group": self.topk_group,
            "scoring_func": None if self.scoring_func == "softmax" else self.scoring_func,
            "routed_scaling_factor": None
            if self.scale_on_output or self.routed_scaling_factor == 1.0
            else self.routed_scaling_factor,
            "e_score_correction_bias": self.e_score_correction_bias,
            "zero_expert_type": self.zero_expert_type,
            "hash_indices_table": self.hash_indices_table,
            "bias_vl": self.bias_vl,
            "image_sentinel_lo": self.image_sentinel_lo or None,
        }

    @staticmethod
    def _refuse(where: str, arguments: dict[str, Any]) -> None:
        asked = [
            name if isinstance(value, torch.Tensor) or callable(value) else f"{name}={value!r}"
            for name, value in arguments.items()
            if value is not None
        ]
        if asked:
            raise ValueError(f"{', '.join(asked)} would have no effect {where}")
