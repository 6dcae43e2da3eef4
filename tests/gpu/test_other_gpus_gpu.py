"""What other GPUs launch, run on this one: their tiles, and kernels without Hopper's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer, error
from fusedmoe.experts import triton, triton_quantized_floating
from fusedmoe.experts.triton_quantized import TritonQuantizedExperts
from fusedmoe.kernels import align, grouped_gemm_quantized, routing
from fusedmoe.kernels.triton import launch
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.keys import FP8_DYNAMIC_128, FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN
from quantized_experts import Quantized

pytestmark = pytest.mark.gpu
SHARED_MEMORY = 99 * 1024
FORMATS = [
    *((name, None) for name in ("int4_g128", "int4_g32_zp", "int8_channel", "mxfp4", "nvfp4")),
    *((name, None) for name in ("iq4_nl", "nf4", "q2_k", "q4_k", "q6_k", "mxfp6_e3m2")),
    *((name, None) for name in ("fp8_channel", "int4_g32_act_order")),
    *(("int8_channel", INT8_DYNAMIC_TOKEN), ("fp8_block", FP8_DYNAMIC_128)),
    ("int4_g128", FP8_DYNAMIC_TOKEN),
]
LAYER = Layer(device="cuda", dtype=torch.bfloat16, T=60, K=4, E=16, H=512, I=256, bias=True)
LAYERS = {
    "one_token": replace(LAYER, T=1, E=64),
    "blocks_of_32": LAYER,
    "large_blocks": replace(LAYER, T=1100, E=8, K=2),
}


@pytest.fixture(autouse=True)
def another_gpu(monkeypatch):
    monkeypatch.setattr(grouped_gemm_quantized, "has_packed_bf16", lambda device: False)
    monkeypatch.setattr(triton_quantized_floating, "_is_roomy", lambda device: False)
    monkeypatch.setattr(launch, "_can_chain", lambda device: False)
    for module in (align, routing):
        monkeypatch.setattr(module, "runs_hopper_cuda", lambda device: False)
    facts = triton.device_facts(torch.device("cuda", 0))
    small = facts._replace(name="another", shared_memory=SHARED_MEMORY)
    monkeypatch.setattr(triton, "device_facts", lambda device: small)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("fmt", "rows"), FORMATS)
def test_quantized_experts(fmt, rows, layer):
    case = Quantized(fmt, rows, LAYERS[layer])
    tensors = case.layer.tensors()
    out, expected = case.run(tensors, TritonQuantizedExperts), case.expected(tensors)
    # What is rounded to 8 bits on the way may fall on the other side of a step.
    assert error(out, expected) <= (4e-3 if rows is None else 2e-2)


@pytest.mark.parametrize("layer", LAYERS)
def test_floats(layer):
    case, mover = LAYERS[layer], MoEPrepareAndFinalizeNoDPEPModular()
    tensors = case.tensors()
    out = case.run(triton.TritonExperts, mover, tensors)
    assert error(out, case.expected(tensors)) <= 8e-3
