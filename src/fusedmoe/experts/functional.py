"""``fused_experts``: the routed experts of one layer as a function of tensors.

T tokens, K picks, e local experts, H hidden, I intermediate, S = 2 where the activation is gated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import MoEOptions
from fusedmoe.experts.functional_call import ExpertsCall, option_words, options_of
from fusedmoe.experts.functional_plain import plain_fused_experts
from fusedmoe.experts.functional_quantized import quantized_fused_experts
from fusedmoe.experts.packed_weight import CPU_QUANTIZED, unpack
from fusedmoe.experts.quantized_operands import config_of, tensors_and_words
from fusedmoe.forward_only import forward_only
from fusedmoe.modular_kernel.experts import merged_activation_config
from fusedmoe.quantization.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig

_DEFAULT_OPTIONS = MoEOptions()
_DEFAULT_NUMBERS = ApplyMoEActivationConfig()


@forward_only
def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation | str = MoEActivation.SILU,
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    quant_config: FusedMoEQuantConfig | None = None,
    *,
    activation_config: ApplyMoEActivationConfig | None = None,
    options: MoEOptions | None = None,
) -> torch.Tensor:
    """sum over k of topk_weights[t, k] * expert topk_ids[t, k] of hidden_states[t]: [T, H].

    hidden_states [T, H], w1 [e, S * I, H] and w2 [e, H, I] (any strides, the dtype of
    hidden_states), topk_weights float [T, K], topk_ids int [T, K]. Ids count from 0 to
    ``global_num_experts`` (default: those of ``expert_map``, else e); -1 is no expert.
    ``expert_map`` int32 [global_num_experts]: local expert of each id, -1 for one of another rank.
    ``quant_config`` carries biases [e, S * I] and [e, H], and describes w1 and w2 where they are
    quantized (packed as ``QuantizedTensor.data``). Nothing is prepacked here: a layer is faster
    where kernels do.

    With ``apply_router_weight_on_input`` (K = 1) the input is weighted, not the output.
    ``options`` force an implementation, ask for batch invariance or bound the scratch memory.

    Raises ValueError where shapes or dtypes disagree, and for ids out of range: on a CPU always; on
    a GPU such ids count as -1, unless ``options.debug_checks``.
    """
    quant_config = quant_config or FUSED_MOE_UNQUANTIZED_CONFIG
    options = _DEFAULT_OPTIONS if options is None else MoEOptions.of(options)
    if not isinstance(activation, MoEActivation):
        activation = MoEActivation.from_str(activation)
    numbers = merged_activation_config(activation_config or _DEFAULT_NUMBERS, quant_config)
    call = ExpertsCall(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        apply_router_weight_on_input,
        global_num_experts,
        expert_map,
        quant_config.w1_bias,
        quant_config.w2_bias,
        numbers,
        options,
    )
    if torch.compiler.is_compiling() and not isinstance(options.experts, type):
        return _op(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            *tensors_and_words(quant_config),
            expert_map,
            activation.value,
            apply_router_weight_on_input,
            global_num_experts,
            numbers.numbers(),
            *option_words(options),
        )
    if quant_config.is_quantized:
        return quantized_fused_experts(call, quant_config)
    return plain_fused_experts(call)


@torch.library.custom_op("fusedmoe::fused_experts", mutates_args=())
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
    deterministic: bool = True,
    tuned_table: str | None = None,
) -> torch.Tensor:
    """``fused_experts`` as torch.compile sees it: opaque."""
    if experts != CPU_QUANTIZED:
        unpack(w1)
        unpack(w2)
    return fused_experts(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        MoEActivation(activation),
        apply_router_weight_on_input,
        global_num_experts,
        expert_map,
        config_of(tensors, words),
        activation_config=ApplyMoEActivationConfig.from_numbers(numbers),
        options=options_of(
            batch_invariant,
            max_workspace_bytes,
            experts,
            debug_checks,
            deterministic,
            tuned_table,
        ),
    )


@_op.register_fake
def _(hidden_states: torch.Tensor, *arguments: object) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)
