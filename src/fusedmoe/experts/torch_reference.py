"""The definition of the experts as an implementation: runs anywhere, whatever the layer asks."""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
)


class TorchExperts(FusedMoEExpertsModular):
    """Runs anywhere, any activation; fp32 arithmetic; slow by design (it reads ids on the host)."""

    name = "torch"
    opaque_name = name
    """The name that compiled code calls it by, subclasses that no table lists included."""

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            dtypes=frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16}),
            batch_invariant=True,
            graph_capture=False,
        )

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        return WorkspaceShapes((0,), (0,), (size.M, size.K))

    def run(self, work: ExpertsWork) -> None:
        if torch.compiler.is_compiling():
            from fusedmoe.experts.functional_call import run_opaque

            run_opaque(self, self.opaque_name, work)
            return
        (T, K), weights = work.topk_ids.shape, work.output_weights_or_ones
        step = self.tokens_at_once(T, K, work.w1, work.w2)
        for start in range(0, T, step):
            part = slice(start, start + step)
            work.output[part] = self.defined(
                work.hidden_states[part],
                work.w1,
                work.w2,
                weights[part],
                work.topk_ids[part],
                activation=work.activation,
                activation_config=self.activation_config,
                w1_bias=self.quant_config.w1_bias,
                w2_bias=self.quant_config.w2_bias,
                expert_map=work.expert_map,
                compute_dtype=torch.promote_types(work.hidden_states.dtype, torch.float32),
            )

    def defined(
        self,
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        **how: Any,
    ) -> torch.Tensor:
        """``experts_reference`` of some of the tokens."""
        return experts_reference(x, w1, w2, weights, ids, **how)

    def tokens_at_once(self, T: int, K: int, w1: torch.Tensor, w2: torch.Tensor) -> int:
        """How many of T tokens go in one pass, w1 [e, N, ...] and w2 [e, H, ...].

        One where batches must not matter, for a BLAS may sum in another order for another number of
        rows; else what ``max_workspace_bytes`` has room for, in fp32, if one expert has all rows:
        [H] before and after for each token, [H], [N], twice [N] or less, and [H] for each row.
        """
        options = self.moe_config.options
        if options.batch_invariant:
            return 1
        limit, H, N = options.max_workspace_bytes, w2.shape[1], w1.shape[1]
        per_token = 4 * (2 * H + K * (2 * H + 3 * N))
        return max(1, T if limit is None else min(T, limit // per_token))
