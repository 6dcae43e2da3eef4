"""Quantized experts on Triton in batched rows: [e, M, H] with a count per expert.

e local experts, M rows per expert at most, H hidden, I intermediate.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.triton_quantized import TritonQuantizedBase
from fusedmoe.experts.triton_quantized_formats import capabilities, emulated_capabilities
from fusedmoe.experts.triton_quantized_ops import batched_op
from fusedmoe.experts.triton_quantized_run import batched_quantized_experts
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEActivationFormat,
    ProblemSize,
    WorkspaceShapes,
)


class BatchedTritonQuantizedExperts(TritonQuantizedBase):
    """As ``TritonQuantizedExperts`` in batched rows; what moved them also weights and sums them."""

    name = "triton_quantized_batched"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return capabilities(FusedMoEActivationFormat.BatchedExperts)

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The activation's output; M counts rows per expert."""
        e, M, H = size.E, size.M, size.K
        width = self.adjust_N_for_activation(size.N, activation)
        return WorkspaceShapes((e, M, width), (0,), (e, M, H))

    def run(self, work: ExpertsWork) -> None:
        counts, dtype = work.rows_per_expert, work.hidden_states.dtype
        config, batch_invariant = self.activation_config, self.moe_config.options.batch_invariant
        if torch.compiler.is_compiling():
            how = batch_invariant, self.emulate
            batched_op(work, *self.flat_operands(), counts, config, *how)
            return
        operands = self.operands_to_run(work.w1, work.w2, work.activation, dtype)
        batched_quantized_experts(
            work, operands, counts, config, batch_invariant=batch_invariant, tiles=self.tiles
        )


class BatchedTritonEmulatedExperts(BatchedTritonQuantizedExperts):
    """As ``TritonEmulatedExperts``, for batched rows."""

    name = "triton_emulated_batched"
    emulate = True

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return emulated_capabilities(FusedMoEActivationFormat.BatchedExperts)
