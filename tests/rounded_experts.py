"""The definition of quantized experts with a rounding to bf16 after each product and activation:
what a chain of separate GEMMs computes, to the bit but for the order of its sums."""

from __future__ import annotations

import torch

from fusedmoe.activation import activation_reference
from fusedmoe.kernels.ids import local_ids
from fusedmoe.quantization.activations import fake_quantize
from quantized_experts import Quantized, Tensors

BF16 = torch.bfloat16


def rounded_reference(case: Quantized, tensors: Tensors) -> torch.Tensor:
    """[T, H] fp32."""
    layer = case.layer
    w1, w2, config = case.config(tensors)
    x, weights = tensors["hidden_states"], tensors["topk_weights"]
    ids = local_ids(tensors["topk_ids"], w1.shape[0], tensors["expert_map"])
    if layer.weight_on_input:
        x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
    x = fake_quantize(x.float(), config.a1.key, config.a1.scale)
    T, K = ids.shape
    middle = torch.zeros(T * K, layer.I)
    slots = {e: (ids.flatten() == e).nonzero().flatten() for e in range(w1.shape[0])}
    for expert, slot in slots.items():
        up = (x[slot // K] @ w1[expert].dequantize(torch.float32).T).to(BF16)
        middle[slot] = activation_reference(layer.activation, up, layer.numbers).to(BF16).float()
    middle = fake_quantize(middle, config.a2.key, config.a2.scale)
    out = torch.zeros(T, layer.H)
    for expert, slot in slots.items():
        down = (middle[slot] @ w2[expert].dequantize(torch.float32).T).to(BF16).float()
        out.index_add_(0, slot // K, down * weights.flatten()[slot, None])
    return out


def assert_rounded(
    out: torch.Tensor, case: Quantized, tensors: Tensors, tolerance: float = 4e-3
) -> None:
    """``out`` is the definition's, up to a value here and there on the other side of a tie."""
    expected = rounded_reference(case, tensors)
    assert torch.equal(out.isnan(), expected.isnan())
    out, expected = out.float().nan_to_num(), expected.nan_to_num()
    error = (out - expected).norm() / expected.norm()
    assert error < tolerance, float(error)
