"""The experts in plain torch: the definition every other implementation is compared with."""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.kernels.ids import local_ids


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
