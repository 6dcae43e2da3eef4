"""One token's layer with 4-bit weights in one launch: against its definition, and the same bits in
every run, however launches follow one another."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.cuda.quantized_token import run_token
from fusedmoe.kernels.device import multiprocessors_of
from fusedmoe.kernels.hopper_quantized import (
    quantized_decode,
    quantized_decode_reference,
    token_cut_for,
)
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.testing.tolerances import relative_error
from gpu_marks import needs_hopper, needs_nvrtc

pytestmark = [pytest.mark.gpu, needs_hopper, needs_nvrtc]
SILU, OAI = MoEActivation.SILU, MoEActivation.SWIGLUOAI
RELU2 = MoEActivation.RELU2_NO_MUL

# format, activation, experts, picks, H, I, bias
CASES = {
    "kimi": ("int4_g32", SILU, 24, 8, 7168, 256, False),
    "gpt_oss": ("mxfp4", OAI, 12, 4, 2880, 2880, True),
    "qwen": ("int4_g128", SILU, 24, 8, 2048, 768, True),
    "odd_picks": ("mxfp4", OAI, 12, 5, 576, 320, True),
    "no_gate": ("int4_g32", RELU2, 12, 2, 1024, 1536, True),
    "one_pick": ("mxfp4", SILU, 4, 1, 2048, 1024, False),
}


def layer_of(name):
    fmt, act, e, K, H, I, bias = CASES[name]  # noqa: E741
    torch.manual_seed(0)
    shards, interleaved = 1 if act is RELU2 else 2, act is OAI

    def weight(shards, N, D, interleaved=False):
        values = torch.randn(e, shards * N, D, device="cuda") / D**0.5
        return quantize(values, format_named(fmt), shards=shards, interleaved=interleaved)

    def filled(*shape, dtype=torch.bfloat16):
        return torch.full(shape, float("nan"), device="cuda", dtype=dtype)

    biases = (torch.randn(e, n, device="cuda").bfloat16() for n in (shards * I, H))
    return LayerTensors(
        torch.randn(1, H, device="cuda").bfloat16(),
        weight(shards, I, H, interleaved),
        weight(1, H, I),
        torch.rand(1, K, device="cuda"),
        torch.randperm(e, device="cuda")[None, :K].int().contiguous(),
        filled(1, H),
        filled(K, I),
        filled(K, H, dtype=torch.float32),
        multiprocessors_of(torch.device("cuda")),
        act,
        None,
        *(biases if bias else (None, None)),
    )


def expected_of(layer):
    layer = layer._replace(out=torch.full_like(layer.out, float("nan")))
    quantized_decode_reference(layer)
    return layer.out.double()


def run(layer):
    cut = token_cut_for(layer, where_faster=False)
    assert cut is not None
    run_token(layer, cut)


@pytest.mark.parametrize("name", ["kimi", "gpt_oss", "qwen"])
def test_it_runs_where_it_is_faster(name):
    layer = layer_of(name)
    assert token_cut_for(layer) is not None
    assert token_cut_for(layer_of("one_pick")) is None
    quantized_decode(layer)
    assert relative_error(layer.out, expected_of(layer)).frobenius < 4e-3


@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    layer = layer_of(name)
    K, e = layer.topk_ids.shape[1], layer.w1.shape[0]
    for ids in (layer.topk_ids, layer.topk_ids.clone(), torch.full_like(layer.topk_ids, -1)):
        if ids is not layer.topk_ids and ids[0, 0] >= 0:
            ids[0, 0], ids[0, K // 2] = -1, e + 7
        one = layer._replace(topk_ids=ids.long() if K == 5 else ids)
        run(one)
        expected = expected_of(one)
        assert relative_error(one.out, expected).frobenius < 4e-3 or one.out.equal(
            expected.bfloat16()
        )
    layer.x[:] = float("nan")
    run(layer)
    assert layer.out.isnan().all()


@pytest.mark.parametrize("name", ["kimi", "gpt_oss"])
def test_the_same_bits_from_replay_to_replay(name):
    """Five calls of a graph, over other picks in turns, 100 times."""
    layer = layer_of(name)
    K = layer.topk_ids.shape[1]
    layers = [
        layer._replace(topk_ids=layer.topk_ids.roll(i, 1), out=torch.empty_like(layer.out))
        for i in range(4)
    ]
    layers.append(layers[0]._replace(topk_ids=torch.full_like(layer.topk_ids, -1)))
    layers[-1] = layers[-1]._replace(out=torch.empty_like(layer.out))
    for one in layers:
        run(one)
    first = [one.out.clone() for one in layers]
    assert not first[-1].any(), f"nothing comes of {K} picks without an expert"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in layers:
            run(one)
    others = 0
    for _ in range(100):
        for one in layers:
            one.out.fill_(float("nan"))
        graph.replay()
        others += sum(not one.out.equal(bits) for one, bits in zip(layers, first, strict=True))
    assert others == 0


@pytest.mark.parametrize("name", ["kimi", "gpt_oss"])
def test_launches_on_several_streams_take_turns(name):
    """All of their blocks meet at one word: each launch has to have every multiprocessor."""
    layer = layer_of(name)
    run(layer)
    expected = layer.out.clone()
    streams = [torch.cuda.Stream(priority=-(i % 2)) for i in range(4)]
    own = ("out", "act")
    layers = [
        layer._replace(**{name: torch.empty_like(getattr(layer, name)) for name in own})
        for _ in streams
    ]
    torch.cuda.synchronize()
    for _ in range(100):
        for one, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                run(one)
    torch.cuda.synchronize()
    assert all(one.out.equal(expected) for one in layers)
