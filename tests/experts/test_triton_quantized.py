"""The quantized Triton experts against the definition, feature by feature."""

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe import MoEOptions
from fusedmoe.activation import MoEActivation
from fusedmoe.experts.triton_quantized import (
    BatchedTritonQuantizedExperts,
)
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    fp8_dynamic_group,
)
from quantized_bodies import triton_gemm, triton_w8a8
from quantized_experts import Quantized

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")


PLAIN = Layer(H=64, I=32)
WIDE = Layer(H=256, I=128)
CASES = {
    "int4": Quantized("int4_g32", layer=replace(PLAIN, dtype=torch.float16)),
    "int4_zero_points": Quantized("int4_g32_zp"),
    "int4_channel": Quantized("int4_channel"),
    "int8": Quantized("int8_channel"),
    "mxfp4_interleaved_bias": Quantized(
        "mxfp4", layer=replace(PLAIN, activation=MoEActivation.SWIGLUOAI, bias=True)
    ),
    "nvfp4": Quantized("nvfp4"),
    "fp8_weights": Quantized("fp8_channel"),
    "fp8_block": Quantized("fp8_block", FP8_DYNAMIC_128, WIDE),
    "fp8_small_blocks": Quantized("fp8_block_32x32", fp8_dynamic_group(32)),
    "fp8_channel": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN),
    "fp8_tensor": Quantized("fp8_tensor", FP8_STATIC_TENSOR),
    "fp8_tensor_map": Quantized("fp8_tensor", FP8_DYNAMIC_TENSOR, replace(PLAIN, E=8, local=3)),
    "int8_rows": Quantized("int8_channel", INT8_DYNAMIC_TOKEN),
    "one_token": Quantized("int4_g32", layer=replace(PLAIN, T=1)),
    "lone_slots": Quantized("mxfp4", layer=replace(PLAIN, T=2, E=16, bias=True)),
    "lone_slots_map": Quantized("int4_g32", layer=replace(PLAIN, T=1, E=32, local=9)),
    "many_rows": Quantized("int4_g32", layer=replace(PLAIN, T=40, E=3)),
    "expert_map_bias": Quantized("int8_channel", layer=replace(PLAIN, E=8, local=5, bias=True)),
    "no_gate": Quantized("mxfp4", layer=replace(PLAIN, activation=MoEActivation.RELU2_NO_MUL)),
    "weight_on_input": Quantized("int4_g32", layer=replace(PLAIN, K=1, weight_on_input=True)),
    "batch_invariant": Quantized(
        "int4_g32", layer=replace(PLAIN, options=MoEOptions(batch_invariant=True))
    ),
    "passes": Quantized(
        "int4_g32", layer=replace(PLAIN, T=9, options=MoEOptions(max_workspace_bytes=2500))
    ),
}


@pytest.fixture
def quantized_bodies(monkeypatch, bodies):
    """The launchers' own references, or Triton's bodies under the interpreter."""
    if bodies == "torch":
        return
    from fusedmoe.kernels import grouped_gemm_quantized as gemm
    from fusedmoe.kernels import grouped_gemm_quantized_w8a8 as w8a8

    monkeypatch.setattr(gemm, "quantized_gemm_reference", triton_gemm)
    monkeypatch.setattr(w8a8, "w8a8_gemm_reference", triton_w8a8)


def assert_right(out, expected, tolerance):
    assert torch.equal(out.isnan(), expected.isnan())
    error = (out.double() - expected).nan_to_num().norm() / expected.nan_to_num().norm()
    assert error < tolerance, float(error)


def tolerance_of(case):
    """Rounding to fp8 is the interpreter's own on the way into a product: see the GPU tests."""
    if case.rows is not None:
        return 0.2
    return 3e-3 if case.layer.dtype == torch.float16 else 2e-5


@pytest.mark.parametrize("name", CASES)
def test_layers(name, quantized_bodies):
    case = CASES[name]
    tensors = case.layer.tensors()
    assert_right(case.run(tensors), case.expected(tensors), tolerance_of(case))


@pytest.mark.parametrize("name", [name for name in CASES if name != "fp8_tensor_map"])
def test_batched_layers(name):
    case = replace(CASES[name], layer=replace(CASES[name].layer, options=MoEOptions()))
    tensors = case.layer.tensors()
    out = case.run(tensors, BatchedTritonQuantizedExperts)
    assert_right(out, case.expected(tensors), tolerance_of(case))
