"""The layer of a few tokens with 4-bit weights in one launch: against its definition, and the same
bits in every run, however launches follow one another."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.cuda.program import missing_nvrtc
from fusedmoe.kernels.cuda.quantized_layer import run_layer
from fusedmoe.kernels.device import multiprocessors_of
from fusedmoe.kernels.hopper_quantized import (
    decode_tiles_for,
    quantized_decode,
    quantized_decode_reference,
    runs_in_one_launch,
)
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.testing.tolerances import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability()[0] != 9
        or missing_nvrtc() is not None,
        reason="needs a Hopper GPU and its compiler",
    ),
]
SILU, OAI = MoEActivation.SILU, MoEActivation.SWIGLUOAI

# format, activation, experts, picks, H, I, tokens, what else
CASES = {
    "kimi": ("int4_g32", SILU, 24, 8, 7168, 256, 16, {}),
    "qwen": ("int4_g128", SILU, 24, 8, 2048, 768, 8, {"bias": True}),
    "qwen_many": ("int4_g128", SILU, 128, 8, 2048, 768, 64, {}),
    "qwen_elsewhere": ("int4_g128", SILU, 32, 8, 2048, 768, 16, {"local": 9}),
    "mixtral_sixteen": ("int4_g128", SILU, 8, 2, 4096, 14336, 64, {}),
    "one_expert": ("int4_g32", SILU, 9, 1, 2048, 512, 60, {"all": 5}),
    "nothing_here": ("int4_g32", SILU, 9, 2, 2048, 512, 20, {"all": -1}),
    "gpt_oss": ("mxfp4", OAI, 12, 4, 2880, 2880, 20, {"bias": True}),
    "many_experts": ("int4_g128", SILU, 700, 4, 512, 256, 128, {}),
}


def layer_of(name):
    fmt, act, E, K, H, I, T, more = CASES[name]  # noqa: E741
    torch.manual_seed(0)
    e = more.get("local", E)

    def weight(shards, N, D):
        values = torch.randn(e, shards * N, D, device="cuda") / D**0.5
        return quantize(
            values, format_named(fmt), shards=shards, interleaved=shards == 2 and act is OAI
        )

    def filled(*shape, dtype=torch.bfloat16):
        return torch.full(shape, float("nan"), device="cuda", dtype=dtype)

    ids = torch.stack([torch.randperm(E, device="cuda")[:K] for _ in range(T)]).int()
    ids[0, 0], ids[-1, -1] = -1, E + 3
    if "all" in more:
        ids[:] = more["all"]
    expert_map = None
    if e < E:
        expert_map = torch.full((E,), -1, dtype=torch.int32, device="cuda")
        expert_map[torch.randperm(E, device="cuda")[:e]] = torch.arange(e, device="cuda").int()
    biases = (torch.randn(e, n, device="cuda").bfloat16() for n in (2 * I, H))
    return LayerTensors(
        torch.randn(T, H, device="cuda").bfloat16(),
        weight(2, I, H),
        weight(1, H, I),
        torch.rand(T, K, device="cuda"),
        ids,
        filled(T, H),
        filled(T * K, I),
        filled(T * K, H, dtype=torch.float32),
        multiprocessors_of(torch.device("cuda")),
        act,
        None,
        *(biases if more.get("bias") else (None, None)),
        expert_map,
    )


def run(layer):
    R, w1, w2 = layer.topk_ids.numel(), layer.w1, layer.w2
    tiles = decode_tiles_for(R, w1, w2, False, layer.programs)
    assert runs_in_one_launch(layer, tiles, where_faster=False)
    assert run_layer(layer, tiles)


@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    layer = layer_of(name)
    expected = layer._replace(out=layer.out.clone())
    quantized_decode_reference(expected)
    run(layer)
    first = layer.out.clone()
    assert relative_error(first, expected.out.double()).frobenius < 4e-3
    for _ in range(50):
        layer.out.fill_(float("nan"))
        run(layer)
        assert layer.out.equal(first)


def test_launches_of_two_streams():
    """Of different layers, each with scratch of its own."""
    layers = [layer_of("kimi"), layer_of("kimi"), layer_of("qwen"), layer_of("qwen")]
    for layer in layers:
        run(layer)
    expected = [layer.out.clone() for layer in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(priority=-i % 2) for i in range(len(layers))]
    for _ in range(100):
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                run(layer)
    torch.cuda.synchronize()
    assert all(layer.out.equal(one) for layer, one in zip(layers, expected, strict=True))


def test_what_is_chosen():
    """One launch, for some slots of small experts."""
    layer = layer_of("kimi")
    R = layer.topk_ids.numel()
    tiles = decode_tiles_for(R, layer.w1, layer.w2, False, layer.programs)
    assert runs_in_one_launch(layer, tiles)
    quantized_decode(layer)
    first = layer.out.clone()
    run(layer)
    assert layer.out.equal(first)
