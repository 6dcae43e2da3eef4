"""The experts on a CPU, in torch alone: with ids given, or routing by themselves."""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.cpu_core import cpu_fused_experts
from fusedmoe.experts.cpu_run import Products, cpu_shapes, scratch_rows
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
    ProblemSize,
    WorkspaceShapes,
)
from fusedmoe.router.base import routing_by

_CAPABILITIES = ExpertsCapabilities(devices=frozenset({"cpu"}), batch_invariant=True)


class CpuExperts(FusedMoEExpertsModular):
    """The default on a CPU, bf16 apart. Its workspace holds the expert outputs in fp32."""

    name = "cpu"

    def products(self, w1: torch.Tensor, w2: torch.Tensor) -> Products | None:
        """What multiplies by these weights, if it is not a plain product."""
        return None

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return _CAPABILITIES

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        return cpu_shapes(size, self.moe_config.in_dtype)

    def run(self, work: ExpertsWork) -> None:
        w1, w2, scratch = work.w1, work.w2, work.workspace13
        work.output.copy_(
            cpu_fused_experts(
                work.hidden_states,
                w1,
                w2,
                work.output_weights_or_ones,
                work.topk_ids,
                activation=work.activation,
                activation_config=self.activation_config,
                w1_bias=self.quant_config.w1_bias,
                w2_bias=self.quant_config.w2_bias,
                expert_map=work.expert_map,
                global_num_experts=work.global_num_experts,
                batch_invariant=self.moe_config.options.batch_invariant,
                scratch=None if scratch is None else scratch.view(torch.float32),
                products=None if torch.compiler.is_compiling() else self.products(w1, w2),
            )
        )


class CpuMonolithicExperts(FusedMoEExpertsMonolithic):
    """As ``CpuExperts``, asking the layer's router itself.

    Not chosen by default; ``MoEOptions(experts="cpu_monolithic")`` forces it.
    """

    name = "cpu_monolithic"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return _CAPABILITIES

    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        router_logits: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        *,
        router: Any,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        routing = routing_by(router, hidden_states, router_logits, input_ids=input_ids)
        (T, H), K = hidden_states.shape, routing.topk_ids.shape[1]
        options = self.moe_config.options
        rows = scratch_rows(T, K, H, options.max_workspace_bytes)
        return cpu_fused_experts(
            hidden_states,
            w1,
            w2,
            routing.topk_weights,
            routing.topk_ids,
            activation=activation,
            activation_config=self.activation_config,
            w1_bias=self.quant_config.w1_bias,
            w2_bias=self.quant_config.w2_bias,
            expert_map=expert_map,
            global_num_experts=global_num_experts,
            apply_router_weight_on_input=apply_router_weight_on_input,
            batch_invariant=options.batch_invariant,
            scratch=hidden_states.new_empty(rows, H, dtype=torch.float32),
        )
