"""Few slots per expert with both operands in 8 bits, on a GPU: every way rows are rounded, every
tile, odd shapes, rows that come rounded, rows and slots that do not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer, error
from fusedmoe.activation import MoEActivation
from fusedmoe.experts import hopper_quantized
from fusedmoe.experts.hopper_quantized import HopperQuantizedExperts
from fusedmoe.experts.triton_quantized import TritonQuantizedExperts
from fusedmoe.kernels.hopper_w8a8 import w8a8_decode
from fusedmoe.modular_kernel import PrepareResult
from fusedmoe.prepare_finalize.luggage import quantize_input
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
)
from fusedmoe.tuning.w8a8_tiles import StreamTile, StreamTiles
from quantized_experts import Quantized

pytestmark = pytest.mark.gpu
NAN = float("nan")
PAIRS = [
    *(("fp8_block", FP8_DYNAMIC_128), ("fp8_block", FP8_DYNAMIC_128_UE8M0)),
    *(("fp8_channel", FP8_DYNAMIC_TOKEN), ("fp8_tensor", FP8_DYNAMIC_TENSOR)),
    *(("fp8_tensor", FP8_STATIC_TENSOR), ("int8_channel", INT8_DYNAMIC_TOKEN)),
    ("int8_channel", INT8_STATIC_TENSOR),
]
LAYER = Layer(device="cuda", dtype=torch.bfloat16, T=60, K=4, E=16, H=512, I=384)
LAYERS = {
    "one_token": replace(LAYER, T=1, E=64),
    "two_tokens": replace(LAYER, T=2, E=64, bias=True),
    "few": replace(LAYER, T=8, E=64),
    "mean_of_four": replace(LAYER, T=64, E=64),
    "mean_of_fifteen": LAYER,
    "spread": replace(LAYER, T=47, E=12, K=4),
    "long": replace(LAYER, T=9, H=4096 + 16, I=1040),
    "odd": replace(LAYER, T=33, H=272, I=144, bias=True),
    "gpt_oss": replace(LAYER, activation=MoEActivation.SWIGLUOAI, bias=True, H=576),
    "no_gate": replace(LAYER, activation=MoEActivation.RELU2_NO_MUL, bias=True, T=33),
    "expert_map": replace(LAYER, E=32, local=9, T=40),
}
TILES = [
    *(StreamTile(128, 64, 8, 2, 8, 3, 2), StreamTile(128, 64, 8, 1, 8, 6, 2)),
    *(StreamTile(256, 128, 8, 2, 8, 3, 1), StreamTile(128, 48, 8, 2, 2, 2, 2)),
    *(StreamTile(128, 64, 8, 2, 8, 5, 1), StreamTile(64, 32, 8, 2, 8, 8, 1)),
]


def assert_right(case, out, tensors):
    """No further from fp64 than 1.05 times torch on the same rounded operands, and bf16."""
    truth = replace(case, rows=None).expected(tensors)
    allowed = 1.05 * error(case.expected(tensors), truth) + 4e-3
    assert error(out, truth) <= allowed, (error(out, truth), allowed)


@pytest.fixture
def decoded(monkeypatch):
    """How often the kernels ran."""
    ran = []

    def run(*args, **kwargs):
        ran.append(1)
        w8a8_decode(*args, **kwargs)

    monkeypatch.setattr(hopper_quantized, "w8a8_decode", run)
    return ran


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("fmt", "rows"), PAIRS, ids=str)
def test_layers(fmt, rows, name, decoded):
    case = Quantized(fmt, rows, LAYERS[name])
    tensors = case.layer.tensors()
    out = case.run(tensors, HopperQuantizedExperts)
    assert decoded
    assert_right(case, out, tensors)
    assert case.run(tensors, HopperQuantizedExperts).equal(out)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("fmt", "rows"), PAIRS[::2], ids=str)
def test_tiles(fmt, rows, tile, monkeypatch):
    case = Quantized(fmt, rows, LAYERS["mean_of_four"])
    tensors = case.layer.tensors()
    expected = case.run(tensors, HopperQuantizedExperts)
    monkeypatch.setattr(HopperQuantizedExperts, "stream_tiles", StreamTiles(tile, tile))
    assert case.run(tensors, HopperQuantizedExperts).equal(expected)


@pytest.mark.parametrize("T", [1, 6, 100])
@pytest.mark.parametrize(("fmt", "rows"), PAIRS[::2], ids=str)
def test_ids_of_no_expert_and_nan_rows(fmt, rows, T, decoded):
    case = Quantized(fmt, rows, replace(LAYER, T=T, E=64))
    tensors = case.layer.tensors()
    tensors["topk_ids"][0] = torch.tensor([-1, 64, -5, 2**31 - 1])
    clean = case.run(tensors, HopperQuantizedExperts)
    assert decoded
    assert (clean[0] == 0).all()
    assert_right(case, clean, tensors)
    if T > 1:
        tensors["hidden_states"][-1] = NAN
        dirty = case.run(tensors, HopperQuantizedExperts)
        # A given scale cannot say that a row of integers was none.
        assert dirty[-1].isnan().all() or rows == INT8_STATIC_TENSOR
        assert dirty[:-1].equal(clean[:-1])


@pytest.mark.parametrize(("fmt", "rows"), PAIRS[::2], ids=str)
@pytest.mark.parametrize("T", [1, 30])
def test_graph_follows_new_routing(fmt, rows, T):
    """Blocks guessed before the tables are there are wrong now and right then."""
    case = Quantized(fmt, rows, replace(LAYER, T=T, E=64))
    tensors = case.layer.tensors()
    run = case.runner(tensors, HopperQuantizedExperts)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(4):
        other = replace(case.layer, seed=seed).tensors()
        if seed == 3:
            other["topk_ids"] = torch.arange(T * 4, device="cuda").view(T, 4).int() % 64
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            tensors[name].copy_(other[name])
        out.fill_(NAN)
        graph.replay()
        assert out.equal(run())
        assert_right(case, out, tensors)


@pytest.mark.parametrize("T", [1, 40, 700])
@pytest.mark.parametrize("experts", [TritonQuantizedExperts, HopperQuantizedExperts])
def test_long_sums_of_one_sign_do_not_shrink(experts, T):
    """Tensor cores alone would cut 3e-2 of them off."""
    case = Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, replace(LAYER, T=T, E=8, K=2, H=4096, I=256))
    tensors = case.layer.tensors()
    for name in ("hidden_states", "w1", "w2"):
        tensors[name] = tensors[name].abs()
    assert error(case.run(tensors, experts), case.expected(tensors)) < 1e-2


@pytest.mark.parametrize(("fmt", "rows"), [PAIRS[0], PAIRS[2], PAIRS[5]], ids=str)
def test_rows_that_were_rounded_before(fmt, rows, monkeypatch, decoded):
    case = Quantized(fmt, rows, replace(LAYER, T=20))
    tensors = case.layer.tensors()
    whole = case.run(tensors, HopperQuantizedExperts)
    monkeypatch.setattr(
        MoEPrepareAndFinalizeNoDPEPModular,
        "prepare",
        lambda self, a1, *others: PrepareResult(*quantize_input(a1, others[5])),
    )
    found = case.run(tensors, HopperQuantizedExperts)
    assert len(decoded) == 2
    # Where x / scale lies within rounding of a tie, either neighbour is right.
    assert error(found, whole.double()) < 1e-2
