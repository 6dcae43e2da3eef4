"""The routed experts of one layer on a CPU, as one function of tensors (how: ``cpu_run.py``)."""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import MoEOptions
from fusedmoe.experts.cpu_gemm import linear_for
from fusedmoe.experts.cpu_plan import Route
from fusedmoe.experts.cpu_run import Layer, Products, run_layer
from fusedmoe.modular_kernel.checks import check_picks, check_weights
from fusedmoe.quantization.config import biased_moe_quant_config
from fusedmoe.words import FLOATS


def cpu_fused_experts(
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
    global_num_experts: int = -1,
    apply_router_weight_on_input: bool = False,
    batch_invariant: bool = False,
    scratch: torch.Tensor | None = None,
    products: Products | None = None,
) -> torch.Tensor:
    """hidden_states [T, H], w1 [e, S * I, H], w2 [e, H, I] -> [T, H]; no gradient flows.

    fp32, fp16 or bf16, all three alike; weights may have any strides. topk_weights fp32 [T, K],
    topk_ids int [T, K] in [-1, global_num_experts), -1 being no expert; global_num_experts -1 means
    the length of ``expert_map`` (int32, global -> local id or -1), else e.
    ``apply_router_weight_on_input`` (K = 1) weights the rows that enter. ``batch_invariant``
    computes every token alone, which makes its bits independent of the others, and T > 1 slow.
    ``scratch`` fp32 [rows, H], rows >= K, bounds the memory used; None allocates up to 256 MiB.
    ``products`` compute what those with w1 and w2 would; compiled code does not use them.

    Raises ValueError for shapes or dtypes that disagree and for ids out of range.
    """
    check_weights(hidden_states, w1, w2, activation, w1_bias, w2_bias)
    check_picks(hidden_states, topk_weights, topk_ids)
    if hidden_states.dtype not in FLOATS:
        raise ValueError(f"hidden_states must be fp32, fp16 or bf16, got {hidden_states.dtype}")
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(
            f"apply_router_weight_on_input needs top-1 routing, got K = {topk_ids.shape[1]}"
        )
    config = activation_config or ApplyMoEActivationConfig()
    if torch.compiler.is_compiling():
        from fusedmoe.experts.functional import fused_experts

        return fused_experts(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            apply_router_weight_on_input,
            global_num_experts,
            expert_map,
            biased_moe_quant_config(w1_bias, w2_bias),
            activation_config=config,
            options=MoEOptions(experts="cpu", batch_invariant=batch_invariant),
        )
    x, weights = hidden_states, topk_weights.float()
    if apply_router_weight_on_input:
        x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
    products = products or Products(linear_for(w1.dtype), w1, w2)
    layer = Layer(products, w1_bias, w2_bias, activation, config, w1.shape[1])
    route = Route.make(w1.shape[0], expert_map, global_num_experts)
    return run_layer(layer, route, x, weights, topk_ids, batch_invariant, scratch)
