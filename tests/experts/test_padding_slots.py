"""Slots of id -1 and tokens of other ranks, with NaN wherever nobody has to look: no trace of it.

For every implementation: new memory is NaN, as are the weights of slots with id -1 and the rows of
tokens that have no other slots; some experts are on another rank. The result has the bits that it
has with zeros in all those places.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_triton_quantized import Quantized

from expert_layers import Layer
from fusedmoe import MoEOptions
from fusedmoe.experts import cpu_int4, cpu_int8
from fusedmoe.experts.cpu import CpuExperts
from fusedmoe.experts.cpu_gemm import has_native
from fusedmoe.experts.cpu_packed import CpuPackedExperts
from fusedmoe.experts.grouped_mm import GroupedMMExperts
from fusedmoe.experts.torch_quantized import TorchQuantizedExperts
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.experts.triton import TritonExperts
from fusedmoe.experts.triton_batched import BatchedTritonExperts
from fusedmoe.experts.triton_quantized import TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_batched import BatchedTritonQuantizedExperts
from fusedmoe.kernels import grouped_gemm_quantized, grouped_gemm_quantized_w8a8
from fusedmoe.prepare_finalize.batched import BatchedPrepareAndFinalize
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    fp8_dynamic_group,
)
from quantized_bodies import triton_gemm, triton_w8a8
from quantized_layers import make_layer

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")
LAYERS = {
    "one_rank": Layer(T=9, K=3, E=6, H=64, I=32),
    "remote_experts": Layer(T=9, K=3, E=12, H=64, I=32, local=5),
    "bias": Layer(T=9, K=3, E=12, H=64, I=32, local=5, bias=True),
    "one_token": Layer(T=1, K=3, E=12, H=64, I=32, local=7),
    "few_slots": Layer(T=3, K=2, E=48, H=64, I=32, local=40),
}
PLAIN = [TorchExperts, CpuExperts, GroupedMMExperts, TritonExperts, BatchedTritonExperts]
QUANTIZED = {
    "int4": ("int4_g32", None),
    "mxfp4": ("mxfp4", None),
    "fp8_per_token": ("fp8_channel", FP8_DYNAMIC_TOKEN),
    "fp8_per_tensor": ("fp8_tensor", FP8_DYNAMIC_TENSOR),
    "fp8_blocks": ("fp8_block_32x32", fp8_dynamic_group(32)),
    "int8": ("int8_channel", INT8_DYNAMIC_TOKEN),
}


def with_padding(layer: Layer, filler: float) -> dict[str, torch.Tensor | None]:
    """The first of several tokens is padding, as is one slot; ``filler`` is what they hold."""
    tensors = layer.tensors()
    ids, weights = tensors["topk_ids"], tensors["topk_weights"]
    ids[layer.T // 2, 1] = -1
    if layer.T > 1:
        ids[0] = -1
        tensors["hidden_states"][0] = filler
    weights[ids == -1] = filler
    return tensors


def assert_no_trace(run, layer: Layer) -> None:
    clean, dirty = (run(with_padding(layer, filler)) for filler in (0.0, NAN))
    assert not clean.isnan().any()
    assert layer.T == 1 or (clean[0] == 0).all()
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def mover_for(experts: type, layer: Layer):
    if experts.activation_format().name == "BatchedExperts":
        return BatchedPrepareAndFinalize(layer.T + 3, layer.local or layer.E)
    return MoEPrepareAndFinalizeNoDPEPModular()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("experts", PLAIN, ids=lambda cls: cls.name)
def test_plain_weights(experts, name, bodies):
    layer = LAYERS[name]
    assert_no_trace(lambda t: layer.run(experts, mover_for(experts, layer), t), layer)


@pytest.mark.skipif(not has_native(torch.bfloat16), reason="this CPU has no bf16 instructions")
@pytest.mark.parametrize("name", LAYERS)
def test_packed_weights(name):
    layer = replace(LAYERS[name], dtype=torch.bfloat16)
    mover = MoEPrepareAndFinalizeNoDPEPModular()
    assert_no_trace(lambda t: layer.run(CpuPackedExperts, mover, t), layer)


@pytest.fixture
def quantized_bodies(bodies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bodies == "triton":
        monkeypatch.setattr(grouped_gemm_quantized, "quantized_gemm_reference", triton_gemm)
        monkeypatch.setattr(grouped_gemm_quantized_w8a8, "w8a8_gemm_reference", triton_w8a8)


def run_quantized(experts: type, name: str, layer: Layer) -> None:
    quantized = Quantized(*QUANTIZED[name], layer)
    assert_no_trace(lambda t: quantized.run(t, experts), layer)


@pytest.mark.parametrize("layer", ["bias", "few_slots"])
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize(
    "experts", [TritonQuantizedExperts, BatchedTritonQuantizedExperts], ids=lambda cls: cls.name
)
def test_quantized_weights(quantized_bodies, experts, name, layer):
    run_quantized(experts, name, LAYERS[layer])


@pytest.mark.parametrize("layer", ["bias", "few_slots"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_in_plain_torch(name, layer):
    run_quantized(TorchQuantizedExperts, name, LAYERS[layer])


@pytest.mark.parametrize("name", ["int8_channel", "int4_g32_zp"])
def test_packed_integers(name):
    if cpu_int8.unmet_int8() or cpu_int4.unmet_int4(16, 32, 32):
        pytest.skip("this CPU has neither VNNI nor AVX-512")
    layer = Layer(T=9, K=2, H=128, I=128)
    experts = make_layer(name, None, options=MoEOptions())[0].routed_experts
    names = ("hidden_states", "topk_weights", "topk_ids")
    assert_no_trace(lambda t: experts.forward_modular(*(t[n] for n in names)), layer)
