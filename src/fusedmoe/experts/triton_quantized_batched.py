"""Quantized experts on Triton in batched rows: [e, M, H] with a count per expert.

e local experts, M rows per expert at most, H hidden, I intermediate.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.triton_quantized import QuantizedTritonExperts
from fusedmoe.experts.triton_quantized_formats import capabilities, emulated_capabilities
from fusedmoe.experts.triton_quantized_ops import batched_op
from fusedmoe.experts.triton_quantized_run import batched_quantized_experts
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    WorkspaceShapes,
    rows_per_expert,
)


class BatchedTritonQuantizedExperts(QuantizedTritonExperts):
    """Batched rows; what moved the rows also weights and sums them."""

    name = "triton_quantized_batched"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return capabilities(FusedMoEActivationFormat.BatchedExperts)

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> WorkspaceShapes:
        """The activation's output; M counts rows per expert."""
        width = self.adjust_N_for_activation(N, activation)
        return WorkspaceShapes((local_num_experts, M, width), (0,), (local_num_experts, M, K))

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        counts = rows_per_expert(expert_tokens_meta, w1.shape[0])
        assert workspace13 is not None
        batch_invariant = self.moe_config.options.batch_invariant
        if torch.compiler.is_compiling():
            batched_op(
                output,
                hidden_states,
                *self.flat_operands(w1, w2),
                counts,
                activation.value,
                self.activation_config.numbers(),
                workspace13,
                batch_invariant,
                self.emulate,
            )
            return
        batched_quantized_experts(
            output,
            hidden_states,
            self.operands_to_run(w1, w2, activation, hidden_states.dtype),
            counts,
            activation,
            self.activation_config,
            workspace13,
            batch_invariant=batch_invariant,
            tiles=self.tiles,
        )


class BatchedTritonEmulatedExperts(BatchedTritonQuantizedExperts):
    """As ``TritonEmulatedExperts``, for batched rows."""

    name = "triton_emulated_batched"
    emulate = True

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return emulated_capabilities(FusedMoEActivationFormat.BatchedExperts)
