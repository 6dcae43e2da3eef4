"""Quantized experts in plain torch: what every kernel for a format is compared with.

Weights are dequantized one expert at a time, activations are rounded to their format and multiplied
back, everything else is as in ``torch_reference``. Any device, any format, slow.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.experts.quantized_operands import quantized_pair
from fusedmoe.experts.torch_batched import BatchedTorchExperts
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.kernels.ids import local_ids
from fusedmoe.modular_kernel import ExpertsCapabilities
from fusedmoe.quantization.activations import fake_quantize
from fusedmoe.quantization.config import FusedMoEQuantDesc
from fusedmoe.quantization.formats.keys import ACTIVATION_KEYS, WEIGHT_KEYS
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR
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


class TorchQuantizedExperts(TorchExperts):
    """Any format on any device, one expert after the other, in fp32."""

    name = "torch_quantized"
    opaque_name = name

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

    def defined(
        self,
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        **how: Any,
    ) -> torch.Tensor:
        config = self.quant_config
        first, second = quantized_pair(w1, w2, config, how["activation"], x.dtype)
        return quantized_experts_reference(
            x, first, second, weights, ids, a1=config.a1, a2=config.a2, **how
        )

    def tokens_at_once(self, T: int, K: int, w1: torch.Tensor, w2: torch.Tensor) -> int:
        config = self.quant_config
        if (
            FP8_DYNAMIC_TENSOR in (config.a1.key, config.a2.key)
            and not self.moe_config.options.batch_invariant
        ):
            return max(1, T)  # all tokens together make the scale
        return super().tokens_at_once(T, K, w1, w2)


class BatchedTorchQuantizedExperts(BatchedTorchExperts, TorchQuantizedExperts):
    """``TorchQuantizedExperts``, which defines what is computed, on batched rows."""

    name = "torch_quantized_batched"
