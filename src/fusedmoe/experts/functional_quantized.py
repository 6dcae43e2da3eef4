"""``fused_experts`` for quantized weights: checks, selection by formats, one run."""

from __future__ import annotations

from functools import lru_cache

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.experts.torch_quantized import quantized_pair
from fusedmoe.modular_kernel import FusedMoEKernel
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.selection import Selection, select

_Keys = tuple[QuantKey | None, QuantKey | None]


def quantized_fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    apply_router_weight_on_input: bool,
    num_experts: int,
    expert_map: torch.Tensor | None,
    quant_config: FusedMoEQuantConfig,
    activation_config: ApplyMoEActivationConfig,
    options: MoEOptions,
) -> torch.Tensor:
    """As ``fused_experts``; w1 [e, S * I, ...] and w2 [e, H, ...] hold packed columns.

    What ``quant_config`` says of them must fit, or it is a ValueError naming the part.
    """
    x = hidden_states
    if x.dim() != 2 or topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected hidden_states [T, H] and topk_ids [T, K], got {tuple(x.shape)} and "
            f"{tuple(topk_ids.shape)}"
        )
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights {tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)} differ"
        )
    first, second = quantized_pair(w1, w2, quant_config, activation, x.dtype)
    (e, N, H), width = first.shape, second.shape[-1]
    if second.shape != (e, x.shape[1], N // (2 if activation.is_gated else 1)) or x.shape[1] != H:
        raise ValueError(
            f"w1 {list(first.shape)} and w2 {list(second.shape)} (unpacked) with "
            f"{activation.value} do not go with hidden_states {list(x.shape)}"
        )
    if expert_map is None and num_experts != e:
        raise ValueError(f"w1 holds {e} of {num_experts} experts: an expert_map must say which")
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    selection = _select(
        num_experts,
        e,
        topk_ids.shape[1],
        H,
        width,
        activation,
        activation_config,
        x.dtype,
        x.device,
        quant_config.w1_bias is not None or quant_config.w2_bias is not None,
        apply_router_weight_on_input,
        options,
        (quant_config.w1.key, quant_config.a1.key),
        (quant_config.w2.key, quant_config.a2.key),
    )
    kernel = selection.make_kernel(quant_config)
    assert isinstance(kernel, FusedMoEKernel)
    return kernel.apply(
        x,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation=activation,
        global_num_experts=num_experts,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )


@lru_cache(maxsize=1024)
def _select(
    num_experts: int,
    num_local: int,
    K: int,
    H: int,
    width: int,
    activation: MoEActivation,
    activation_config: ApplyMoEActivationConfig,
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool,
    apply_router_weight_on_input: bool,
    options: MoEOptions,
    up_keys: _Keys,
    down_keys: _Keys,
) -> Selection:
    """What selection prefers for a layer of these sizes and formats on this device."""
    moe = FusedMoEConfig(
        num_experts=max(num_experts, K),  # a rank may hold fewer experts than a token picks
        num_local_experts=num_local,
        experts_per_token=K,
        hidden_dim=H,
        intermediate_size_per_partition=width,
        activation=activation,
        activation_config=activation_config,
        in_dtype=dtype,
        device=device,
        has_bias=has_bias,
        apply_router_weight_on_input=apply_router_weight_on_input,
        require_modular=True,
        options=options,
    )
    return select(moe, *up_keys, down_keys=down_keys)
