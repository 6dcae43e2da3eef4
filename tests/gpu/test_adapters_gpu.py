"""Adapters of what comes with torch, on a GPU: the definition is what they compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe.experts.cutlass_fp8 import CutlassBatchedExpertsFp8, CutlassExpertsFp8
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR
from gpu_marks import needs_hopper
from quantized_experts import Quantized

pytestmark = pytest.mark.gpu
LAYER = Layer(T=37, K=2, E=8, H=256, I=128, dtype=torch.bfloat16, device="cuda")
CASES = {
    "channel": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, LAYER),
    "tensor": Quantized("fp8_tensor", FP8_STATIC_TENSOR, LAYER),
    "dynamic": Quantized("fp8_tensor", FP8_DYNAMIC_TENSOR, LAYER),
    "map": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, replace(LAYER, local=3)),
    "one_token": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, replace(LAYER, T=1)),
    "many": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, replace(LAYER, T=1000)),
}


@needs_hopper
@pytest.mark.parametrize("experts", [CutlassExpertsFp8, CutlassBatchedExpertsFp8])
@pytest.mark.parametrize("name", CASES)
def test_cutlass_fp8(name, experts):
    case = CASES[name]
    if experts is CutlassBatchedExpertsFp8 and case.rows == FP8_DYNAMIC_TENSOR:
        pytest.skip("one scale for all rows has no batched form")
    tensors = case.layer.tensors()
    tensors["topk_ids"][0, 0] = -1
    run = case.runner(tensors, experts)
    found, expected = run(), case.expected(tensors)
    assert ((found.double() - expected).norm() / expected.norm()).item() < 0.03
    assert found.equal(run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    graph.replay()
    assert replayed.equal(found)
