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
    ExpertsWork,
    FusedMoEActivationFormat,
    ProblemSize,
    WorkspaceShapes,
)


class BatchedTritonQuantizedExperts(QuantizedTritonExperts):
    """Batched rows; what moved the rows also weights and sums them."""

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
        counts, (w1, w2), x = work.rows_per_expert, (work.w1, work.w2), work.hidden_states
        assert work.workspace13 is not None
        batch_invariant = self.moe_config.options.batch_invariant
        if torch.compiler.is_compiling():
            batched_op(
                work.output,
                x,
                *self.flat_operands(w1, w2),
                counts,
                work.activation.value,
                self.activation_config.numbers(),
                work.workspace13,
                batch_invariant,
                self.emulate,
            )
            return
        batched_quantized_experts(
            work.output,
            x,
            self.operands_to_run(w1, w2, work.activation, x.dtype),
            counts,
            work.activation,
            self.activation_config,
            work.workspace13,
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
