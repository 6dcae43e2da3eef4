"""The experts in plain torch: the definition every other implementation is compared with."""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.kernels.ids import local_ids
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
)


def experts_reference(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """x [T, H], w1 [e, S * I, H], w2 [e, H, I] -> [T, H] in x's dtype, all sums in compute_dtype.

    out[t] = sum over k of weight[t, k] * (act(x[t] W1^T + b1) W2^T + b2), for slots whose expert
    is here. With ``apply_router_weight_on_input`` (K = 1) the input is weighted instead.
    """
    x = hidden_states.to(compute_dtype)
    weights = topk_weights.to(compute_dtype)
    if apply_router_weight_on_input:
        x, weights = x * weights, torch.ones_like(weights)
    ids = local_ids(topk_ids, w1.shape[0], expert_map)
    out = torch.zeros(x.shape[0], w2.shape[1], dtype=compute_dtype, device=x.device)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, pick = (ids == expert).nonzero(as_tuple=True)
        up = x[token] @ w1[expert].to(compute_dtype).T
        if w1_bias is not None:
            up = up + w1_bias[expert].to(compute_dtype)
        act = activation_reference(activation, up, activation_config).to(compute_dtype)
        down = act @ w2[expert].to(compute_dtype).T
        if w2_bias is not None:
            down = down + w2_bias[expert].to(compute_dtype)
        out.index_add_(0, token, down * weights[token, pick, None])
    return out.to(hidden_states.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over numbers of ``dtype`` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TorchExperts(FusedMoEExpertsModular):
    """Runs anywhere, any activation; fp32 arithmetic; slow by design (it reads ids on the host)."""

    name = "torch"
    opaque_name = name
    """What compiled code calls, of a class that no table has, too."""

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
                compute_dtype=wide_dtype(work.hidden_states.dtype),
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
