"""Quantized experts in plain torch: what every kernel for a format is compared with.

Weights are dequantized one expert at a time, activations are rounded to their format and multiplied
back, everything else is as in ``torch_reference``. Any device, any format, slow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.experts.quantized_operands import config_of, quantized_pair, tensors_and_words
from fusedmoe.kernels.ids import local_ids
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertTokensMetadata,
    FusedMoEExpertsModular,
    WorkspaceShapes,
)
from fusedmoe.quantization.activations import fake_quantize
from fusedmoe.quantization.config import FusedMoEQuantConfig, FusedMoEQuantDesc
from fusedmoe.quantization.formats.keys import ACTIVATION_KEYS, WEIGHT_KEYS
from fusedmoe.quantization.tensor import QuantizedTensor


def quantized_experts_reference(
    hidden_states: torch.Tensor,
    w1: QuantizedTensor,
    w2: QuantizedTensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    a1: FusedMoEQuantDesc | None = None,
    a2: FusedMoEQuantDesc | None = None,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """x [T, H], w1 [e, S * I, H], w2 [e, H, I] -> [T, H] in x's dtype, all sums in compute_dtype.

    As ``experts_reference`` on the dequantized weights. ``a1`` and ``a2`` say how the rows that
    enter each product are quantized; the second is from the activation's fp32 result, all experts
    together.
    """
    x = hidden_states.to(compute_dtype)
    weights = topk_weights.to(compute_dtype)
    if apply_router_weight_on_input:
        x, weights = x * weights, torch.ones_like(weights)
    ids = local_ids(topk_ids, w1.shape[0], expert_map)
    x = _quantized(x, a1)
    (T, K), I = ids.shape, w2.shape[-1]  # noqa: E741
    middle = x.new_zeros(T * K, I)
    slots = {
        expert: (ids.flatten() == expert).nonzero().squeeze(1)
        for expert in ids.unique().tolist()
        if expert >= 0
    }
    for expert, slot in slots.items():
        up = x[slot // K] @ w1[expert].dequantize(compute_dtype).T
        if w1_bias is not None:
            up = up + w1_bias[expert].to(compute_dtype)
        middle[slot] = activation_reference(activation, up, activation_config).to(compute_dtype)
    middle = _quantized(middle, a2)
    out = torch.zeros(T, w2.shape[-2], dtype=compute_dtype, device=x.device)
    for expert, slot in slots.items():
        down = middle[slot] @ w2[expert].dequantize(compute_dtype).T
        if w2_bias is not None:
            down = down + w2_bias[expert].to(compute_dtype)
        out.index_add_(0, slot // K, down * weights.flatten()[slot, None])
    return out.to(hidden_states.dtype)


def _quantized(x: torch.Tensor, desc: FusedMoEQuantDesc | None) -> torch.Tensor:
    return x if desc is None else fake_quantize(x, desc.key, desc.scale)


class TorchQuantizedExperts(FusedMoEExpertsModular):
    """Any format on any device, one expert after the other, in fp32."""

    name = "torch_quantized"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            dtypes=frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16}),
            weight_formats=frozenset(
                (weight, activation)
                for weight in WEIGHT_KEYS
                for activation in (None, *ACTIVATION_KEYS)
            ),
            batch_invariant=True,
            graph_capture=False,
            emulated=frozenset(("activations", key) for key in ACTIVATION_KEYS),
        )

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> WorkspaceShapes:
        return WorkspaceShapes((0,), (0,), (M, K))

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        config, numbers = self.quant_config, self.activation_config
        invariant = self.moe_config.options.batch_invariant
        if torch.compiler.is_compiling():
            routed = _op(
                hidden_states,
                w1,
                w2,
                weights,
                topk_ids,
                *tensors_and_words(config),
                expert_map,
                activation.value,
                numbers.numbers(),
                invariant,
            )
        else:
            first, second = quantized_pair(w1, w2, config, activation, hidden_states.dtype)
            routed = _run(
                hidden_states,
                first,
                second,
                weights,
                topk_ids,
                expert_map,
                config,
                activation,
                numbers,
                invariant,
            )
        output.copy_(routed)


def _run(
    hidden_states: torch.Tensor,
    w1: QuantizedTensor,
    w2: QuantizedTensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    config: FusedMoEQuantConfig,
    activation: MoEActivation,
    numbers: ApplyMoEActivationConfig,
    batch_invariant: bool,
) -> torch.Tensor:
    """The reference on all tokens, or on each alone: a BLAS may sum more rows in another order."""
    T = hidden_states.shape[0]
    step = 1 if batch_invariant else max(1, T)
    output = hidden_states.new_empty(T, w2.shape[-2])
    for start in range(0, T, step):
        part = slice(start, start + step)
        output[part] = quantized_experts_reference(
            hidden_states[part],
            w1,
            w2,
            topk_weights[part],
            topk_ids[part],
            a1=config.a1,
            a2=config.a2,
            activation=activation,
            activation_config=numbers,
            w1_bias=config.w1_bias,
            w2_bias=config.w2_bias,
            expert_map=expert_map,
            compute_dtype=_wide(hidden_states.dtype),
        )
    return output


# Which experts have rows is known only at run time, so a compiler must not look inside.
@torch.library.custom_op("fusedmoe::torch_quantized_experts", mutates_args=())
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
    numbers: Sequence[float],
    batch_invariant: bool,
) -> torch.Tensor:
    config, act = config_of(tensors, words), MoEActivation(activation)
    return _run(
        hidden_states,
        *quantized_pair(w1, w2, config, act, hidden_states.dtype),
        topk_weights,
        topk_ids,
        expert_map,
        config,
        act,
        ApplyMoEActivationConfig.from_numbers(numbers),
        batch_invariant,
    )


@_op.register_fake
def _(
    hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, *rest: object
) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], w2.shape[1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
