"""The definition of quantized experts with a rounding to bf16 after each product and activation:
what a chain of separate GEMMs computes, to the bit but for the order of its sums."""

from __future__ import annotations

from dataclasses import replace

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


def check_dead_slots_and_nan_rows(case: Quantized, experts: type) -> None:
    """``case`` has six tokens: slots of no expert are zero, and a NaN row harms no other."""
    tensors = case.layer.tensors()
    ids = tensors["topk_ids"]
    ids[0], ids[1, 0] = -1, -1
    clean = case.run(tensors, experts)
    assert (clean[0] == 0).all()
    assert_rounded(clean, case, tensors)
    tensors["hidden_states"][3] = float("nan")
    dirty = case.run(tensors, experts)
    assert dirty[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert dirty[others].equal(clean[others])


def check_one_expert_no_local_slot_and_no_tokens(case: Quantized, experts: type) -> None:
    """``case`` has one pick per token."""
    tensors = case.layer.tensors()
    tensors["topk_ids"].fill_(2)
    assert_rounded(case.run(tensors, experts), case, tensors)
    tensors["topk_ids"].fill_(-1)
    assert (case.run(tensors, experts) == 0).all()
    empty = replace(case, layer=replace(case.layer, T=0))
    assert empty.run(empty.layer.tensors(), experts).shape == (0, case.layer.H)


def check_strange_strides_and_int64_ids(case: Quantized, experts: type) -> None:
    tensors = case.layer.tensors()
    tensors["hidden_states"] = tensors["hidden_states"].t().contiguous().t()
    tensors["topk_ids"] = tensors["topk_ids"].long().t().contiguous().t()
    assert_rounded(case.run(tensors, experts), case, tensors)
