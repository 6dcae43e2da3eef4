"""The routers: a rule with its tensors, and a function of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from fusedmoe.config import RoutingMethodType
from fusedmoe.kernels.routing import append_shared_experts
from fusedmoe.router.base import BaseRouter, RoutingInputs
from fusedmoe.router.functional import route
from fusedmoe.router.method_type import routing_method_of
from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors

CustomRoutingFunction = Callable[
    [torch.Tensor, torch.Tensor, int, bool], tuple[torch.Tensor, torch.Tensor]
]


class SpecRouter(nn.Module, BaseRouter):
    """Routes by a ``RoutingSpec``.

    The tensors of the rule are read at each call and move with the module. They belong to
    whoever made them: a Parameter is shared, a plain tensor becomes a buffer, and neither
    appears in this module's ``state_dict``. An owner that replaces its tensors instead of writing
    into them passes a function that returns the current ones.
    """

    correction_bias: torch.Tensor | None
    per_expert_scale: torch.Tensor | None
    hash_indices_table: torch.Tensor | None
    vision_bias: torch.Tensor | None

    def __init__(
        self,
        spec: RoutingSpec,
        tensors: RoutingTensors | Callable[[], RoutingTensors] | None = None,
        *,
        routing_method_type: RoutingMethodType | None = None,
        require_padding_mask: bool = False,
    ) -> None:
        super().__init__()
        # On the instance: attributes found in the class cost torch.compile's guards more.
        self.eplb_state = None
        self.capture_fn = None
        self.spec = spec
        self.top_k = spec.top_k
        self.num_experts = spec.num_experts
        self.num_fused_shared_experts = spec.num_fused_shared_experts
        self.shared_expert_weight = spec.shared_expert_weight
        self.require_padding_mask = require_padding_mask
        self._read_tensors = tensors if callable(tensors) else None
        if not callable(tensors):
            for field in fields(RoutingTensors):
                tensor = getattr(tensors, field.name, None)
                if isinstance(tensor, nn.Parameter):
                    self.register_parameter(field.name, tensor)
                else:
                    self.register_buffer(field.name, tensor, persistent=False)
            self.tensors.check(spec)
        self.routing_method_type = (
            routing_method_of(spec, self.tensors)
            if routing_method_type is None
            else routing_method_type
        )

    @property
    def holds_its_tensors(self) -> bool:
        """Whether its tensors are this module's own, not read from an owner at each call."""
        return self._read_tensors is None

    @property
    def tensors(self) -> RoutingTensors:
        """The tensors of the rule, as they are now."""
        if self._read_tensors is not None:
            return self._read_tensors()
        return RoutingTensors(
            correction_bias=self.correction_bias,
            per_expert_scale=self.per_expert_scale,
            hash_indices_table=self.hash_indices_table,
            vision_bias=self.vision_bias,
        )

    def compute_routing(self, given: RoutingInputs) -> RoutingResult:
        return route(
            given.router_logits,
            self.spec,
            self.tensors,
            input_ids=given.input_ids,
            is_padding=given.is_padding,
            indices_dtype=given.indices_dtype,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        *,
        input_ids: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
    ) -> RoutingResult:
        """``route`` with int32 ids."""
        return self.route(hidden_states, router_logits, input_ids=input_ids, is_padding=is_padding)

    def extra_repr(self) -> str:
        """What is not as ``RoutingSpec`` has it by default."""
        given = (
            (field.name, getattr(self.spec, field.name))
            for field in fields(RoutingSpec)
            if getattr(self.spec, field.name) != field.default
        )
        return ", ".join(f"{name}={value!r}" for name, value in given)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the tensors are saved by their owner."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the tensors are loaded by their owner."""


class CustomRouter(BaseRouter):
    """Routes by ``custom_routing_function(hidden_states, gating_output, topk, renormalize)``.

    The function returns weights and ids, [T, K] each; ``routed_scaling_factor`` is applied here,
    and ids outside [0, num_experts) become -1 with weight 0.
    """

    routing_method_type = RoutingMethodType.Custom

    def __init__(
        self,
        custom_routing_function: CustomRoutingFunction,
        top_k: int,
        num_experts: int,
        *,
        renormalize: bool = True,
        routed_scaling_factor: float = 1.0,
        num_fused_shared_experts: int = 0,
        shared_expert_weight: float = 1.0,
        require_padding_mask: bool = False,
    ) -> None:
        self.custom_routing_function = custom_routing_function
        self.top_k = top_k
        self.num_experts = num_experts
        self.renormalize = renormalize
        self.routed_scaling_factor = routed_scaling_factor
        self.num_fused_shared_experts = num_fused_shared_experts
        self.shared_expert_weight = shared_expert_weight
        self.require_padding_mask = require_padding_mask

    def compute_routing(self, given: RoutingInputs) -> RoutingResult:
        weights, ids = self.custom_routing_function(
            given.hidden_states, given.router_logits, self.top_k, self.renormalize
        )
        expected = (given.router_logits.shape[0], self.top_k)
        if tuple(weights.shape) != expected or tuple(ids.shape) != expected:
            raise ValueError(
                f"custom_routing_function must return weights and ids of shape {expected}, got "
                f"{tuple(weights.shape)} and {tuple(ids.shape)}"
            )
        if ids.is_floating_point():
            raise ValueError(
                "custom_routing_function must return weights, then ids, which are integers, got "
                f"{weights.dtype} and {ids.dtype}"
            )
        weights, ids = weights.float() * self.routed_scaling_factor, ids.long()
        ids = ids.masked_fill((ids < 0) | (ids >= self.num_experts), -1)
        return finish_routing(self, weights, ids, given)


def finish_routing(
    router: BaseRouter, weights: torch.Tensor, ids: torch.Tensor, given: RoutingInputs
) -> RoutingResult:
    """Empty and padding slots weigh 0, and the shared experts of ``router`` are appended."""
    if given.is_padding is not None:
        ids = ids.masked_fill(given.is_padding[:, None], -1)
    weights = weights.masked_fill(ids < 0, 0.0)
    if router.num_fused_shared_experts:
        weights, ids = append_shared_experts(
            weights,
            ids,
            router.num_experts,
            router.num_fused_shared_experts,
            router.shared_expert_weight,
            given.is_padding,
        )
    return RoutingResult(weights, ids.to(given.indices_dtype))
