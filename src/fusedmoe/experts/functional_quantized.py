"""``fused_experts`` for quantized weights: checks, selection by formats, one run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.functional_call import (
    ExpertsCall,
    check_call,
    option_words,
    options_of,
    run_selected,
    selection_for,
)
from fusedmoe.experts.quantized_operands import config_of, quantized_pair, tensors_and_words
from fusedmoe.quantization.config import FusedMoEQuantConfig


def quantized_fused_experts(call: ExpertsCall, quant_config: FusedMoEQuantConfig) -> torch.Tensor:
    """As ``fused_experts``; w1 [e, S * I, ...] and w2 [e, H, ...] hold packed columns.

    What ``quant_config`` says of them must fit, or it is a ValueError naming the part.
    """
    x, activation = call.hidden_states, call.activation
    first, second = quantized_pair(call.w1, call.w2, quant_config, activation, x.dtype)
    (e, N, H), width = first.shape, second.shape[-1]
    check_call(call, e)
    if second.shape != (e, x.shape[1], N // (2 if activation.is_gated else 1)) or x.shape[1] != H:
        raise ValueError(
            f"w1 {list(first.shape)} and w2 {list(second.shape)} (unpacked) with "
            f"{activation.value} do not go with hidden_states {list(x.shape)}"
        )
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    selection = selection_for(
        call,
        e,
        width,
        (quant_config.w1.key, quant_config.a1.key),
        (quant_config.w2.key, quant_config.a2.key),
    )
    return run_selected(call, selection, quant_config)


def opaque_quantized(call: ExpertsCall, quant_config: FusedMoEQuantConfig) -> torch.Tensor:
    """As ``quantized_fused_experts``, in compiled code."""
    return _op(
        call.hidden_states,
        call.w1,
        call.w2,
        call.topk_weights,
        call.topk_ids,
        *tensors_and_words(quant_config),
        call.expert_map,
        call.activation.value,
        call.apply_router_weight_on_input,
        call.global_num_experts,
        call.activation_config.numbers(),
        *option_words(call.options),
    )


@torch.library.custom_op("fusedmoe::fused_quantized_experts", mutates_args=())
def _op(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    words: str,
    expert_map: torch.Tensor | None,
    activation: str,
    apply_router_weight_on_input: bool,
    global_num_experts: int,
    numbers: Sequence[float],
    batch_invariant: bool,
    max_workspace_bytes: int | None,
    experts: str | None,
    debug_checks: bool,
    deterministic: bool,
    tuned_table: str | None,
) -> torch.Tensor:
    config = config_of(tensors, words)
    call = ExpertsCall(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        MoEActivation(activation),
        apply_router_weight_on_input,
        global_num_experts,
        expert_map,
        config.w1_bias,
        config.w2_bias,
        ApplyMoEActivationConfig.from_numbers(numbers),
        options_of(
            batch_invariant,
            max_workspace_bytes,
            experts,
            debug_checks,
            deterministic,
            tuned_table,
        ),
    )
    return quantized_fused_experts(call, config)


@_op.register_fake
def _(hidden_states: torch.Tensor, *arguments: object) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)
