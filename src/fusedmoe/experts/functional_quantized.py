"""``fused_experts`` for quantized weights: checks, selection by formats, one run."""

from __future__ import annotations

import torch

from fusedmoe.experts.functional_call import ExpertsCall, check_call, run_selected, selection_for
from fusedmoe.experts.quantized_operands import quantized_pair
from fusedmoe.modular_kernel.checks import check_device
from fusedmoe.quantization.config import FusedMoEQuantConfig


def quantized_fused_experts(call: ExpertsCall, quant_config: FusedMoEQuantConfig) -> torch.Tensor:
    """As ``fused_experts``; w1 [e, S * I, ...] and w2 [e, H, ...] hold packed columns.

    What ``quant_config`` says of them must fit, or it is a ValueError naming the part.
    """
    x, activation = call.hidden_states, call.activation
    first, second = quantized_pair(call.w1, call.w2, quant_config, activation, x.dtype)
    for name, parts in (("w1", first.parts()), ("w2", second.parts())):
        check_device(x, **{f"{name}'s {part}": tensor for part, tensor in parts.items()})
    check_device(x, w1_bias=call.w1_bias, w2_bias=call.w2_bias)
    (e, N, H), width = first.shape, second.shape[-1]
    check_call(call, e)
    if second.shape != (e, x.shape[1], N // (2 if activation.is_gated else 1)) or x.shape[1] != H:
        raise ValueError(
            f"w1 {list(first.shape)} and w2 {list(second.shape)} (unpacked) with "
            f"{activation.value} do not go with hidden_states {list(x.shape)}"
        )
    for name, bias, rows in (("w1_bias", call.w1_bias, N), ("w2_bias", call.w2_bias, H)):
        if bias is not None and bias.shape != (e, rows):
            raise ValueError(f"{name} is {tuple(bias.shape)}, expected {(e, rows)}")
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
