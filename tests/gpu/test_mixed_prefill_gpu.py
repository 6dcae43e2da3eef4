"""Prefill with quantized weights and 16-bit rows on a Hopper GPU: every format, all shapes of
tiles, odd sizes, graphs, slots without an expert, rows that are NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer, error
from fusedmoe.activation import MoEActivation
from fusedmoe.experts import hopper_quantized
from fusedmoe.experts.hopper_quantized import HopperEmulatedExperts, HopperQuantizedExperts
from fusedmoe.kernels.hopper_mixed_prefill import mixed_prefill, wide_rows
from fusedmoe.quantization import keys
from fusedmoe.testing import assert_no_worse
from fusedmoe.testing.tolerances import TOLERANCES
from fusedmoe.tuning.mixed_tiles import MixedPrefillTiles, mixed_prefill_tiles
from packed_weights import format_of
from quantized_experts import Quantized

pytestmark = pytest.mark.gpu
MANY = Layer(device="cuda", dtype=torch.bfloat16, T=500, K=2, E=5, H=512, I=384)
CASES = {
    "int4_g128": Quantized("int4_g128", layer=MANY),
    "int4_g32_zp": Quantized("int4_g32_zp", layer=replace(MANY, H=544, I=288)),
    "int4_channel_zp": Quantized("int4_channel_zp", layer=replace(MANY, E=16, local=5, T=900)),
    "mxfp4": Quantized(
        "mxfp4",
        layer=replace(MANY, activation=MoEActivation.SWIGLUOAI, bias=True, H=576, I=320, T=700),
    ),
    "nvfp4": Quantized(
        "nvfp4", layer=replace(MANY, activation=MoEActivation.RELU2_NO_MUL, bias=True, I=320)
    ),
    "mxfp6_e3m2": Quantized("mxfp6_e3m2", layer=MANY),
    "mxfp6_e2m3": Quantized(
        "mxfp6_e2m3",
        layer=replace(MANY, activation=MoEActivation.SWIGLUOAI, bias=True, H=576, I=320),
    ),
    "nf4": Quantized("nf4", layer=MANY),
    "q4_k": Quantized(
        "q4_k",
        layer=replace(MANY, activation=MoEActivation.SWIGLUOAI, bias=True, H=768, I=256),
    ),
    "q5_k": Quantized("q5_k", layer=replace(MANY, I=512)),
    "q4_k_by_q5_k": Quantized("q4_k", down="q5_k", layer=replace(MANY, I=512)),
    "iq4_nl": Quantized("iq4_nl", layer=replace(MANY, H=544, I=288)),
    "iq4_nl_wide": Quantized("iq4_nl@float32", layer=replace(MANY, H=544, I=288)),
    "int8_channel": Quantized("int8_channel", layer=MANY),
    "int8_g32": Quantized("int8_g32", layer=replace(MANY, H=544, I=288)),
    "mxfp8": Quantized("mxfp8", layer=replace(MANY, activation=MoEActivation.SWIGLUOAI, bias=True)),
    "fp8_block": Quantized("fp8_block", layer=replace(MANY, H=576, I=320)),
    "fp8_tensor": Quantized("fp8_tensor", layer=MANY),
    "two_formats": Quantized("int4_g64", down="int8_channel", layer=MANY),
    "many_tiles": Quantized("int4_g128", layer=replace(MANY, T=6000, H=2048, I=768)),
}


@pytest.fixture
def ran(monkeypatch):
    """One entry for each launch."""
    launches = []

    def run(layer, tiles, *rounding):
        launches.append(tiles)
        mixed_prefill(layer, tiles, *rounding)

    monkeypatch.setattr(hopper_quantized, "mixed_prefill", run)
    return launches


def tiles_of(mean, *formats):
    """Those for so many slots per expert, with blocks finished in groups of four."""
    bits = tuple(format_of(fmt).bits for fmt in formats)
    wide = wide_rows(*map(format_of, formats))
    *tiles, tails = mixed_prefill_tiles(mean, 1, bits, wide=wide)

    def grouped(pair):
        return tuple(replace(tile, group=4) for tile in pair)

    return MixedPrefillTiles(*grouped(tiles), tails and grouped(tails))


# Every format in one shape of tiles, and in all shapes what differs most.
IN_ALL_TILES = {
    "int4_g128",
    "int4_g32_zp",
    "mxfp4",
    "nvfp4",
    "fp8_block",
    "mxfp6_e3m2",
    "q4_k",
    "iq4_nl",
}


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        (name, mean)
        for name in CASES
        for mean in (32, 128, 256)
        if mean == 128 or name in IN_ALL_TILES
    ],
)
def test_formats(name, mean, ran, monkeypatch):
    case = CASES[name]
    tiles = tiles_of(mean, case.format, case.down or case.format)
    monkeypatch.setattr(HopperQuantizedExperts, "mixed_tiles", tiles)
    tensors = case.layer.tensors()
    run = case.runner(tensors, HopperQuantizedExperts)
    out = run().clone()
    assert ran
    assert error(out, case.expected(tensors)) < TOLERANCES["weight_only"].frobenius
    assert run().equal(out)


@pytest.mark.parametrize("mean", [32, 128, 256])
def test_in_a_graph_with_no_expert_and_nan_rows(mean, ran, monkeypatch):
    tiles = tiles_of(mean, "mxfp4", "mxfp4")
    monkeypatch.setattr(HopperQuantizedExperts, "mixed_tiles", tiles)
    case = CASES["mxfp4"]
    tensors = case.layer.tensors()
    tensors["topk_ids"][0], tensors["topk_ids"][1] = -1, 2**31 - 1
    run = case.runner(tensors, HopperQuantizedExperts)
    clean = run().clone()
    assert ran
    assert (clean[:2] == 0).all()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run()
    tensors["hidden_states"][-1] = float("nan")
    graph.replay()
    assert out[:-1].equal(clean[:-1])
    assert out[-1].isnan().all()


@pytest.mark.parametrize("mean", [32, 128, 256])
def test_blocks_that_are_not_full(mean, ran, monkeypatch):
    """What is multiplied of them holds all of their slots, in every launch."""
    monkeypatch.setattr(HopperQuantizedExperts, "mixed_tiles", tiles_of(mean, "mxfp4", "mxfp4"))
    case = CASES["mxfp4"]
    tensors = case.layer.tensors()
    tensors["topk_ids"][:, 1] = -1
    for counts in ((20, 40, 90, 150, 400), (0, 64, 110, 170, 356)):
        slots = torch.tensor(counts, device="cuda")
        tensors["topk_ids"][:, 0] = torch.arange(5, device="cuda").repeat_interleave(slots)
        out = case.run(tensors, HopperQuantizedExperts)
        assert ran
        assert error(out, case.expected(tensors)) < TOLERANCES["weight_only"].frobenius


def test_all_tokens_to_one_expert(ran):
    case = CASES["int4_g128"]
    tensors = case.layer.tensors()
    tensors["topk_ids"][:, 0], tensors["topk_ids"][:, 1] = 3, -1
    out = case.run(tensors, HopperQuantizedExperts)
    assert ran
    assert error(out, case.expected(tensors)) < TOLERANCES["weight_only"].frobenius


ROUNDED = {
    "nvfp4": ("nvfp4", keys.NVFP4_DYNAMIC, replace(MANY, bias=True, I=320)),
    "mxfp4": ("mxfp4", keys.MXFP4_DYNAMIC, replace(MANY, E=16, local=5, T=900)),
    "mxfp6_e3m2": ("mxfp6_e3m2", keys.MXFP6_E3M2_DYNAMIC, MANY),
    "mxfp8": ("mxfp8", keys.MXFP8_DYNAMIC, MANY),
    "int4_by_fp8": ("int4_g128", keys.FP8_DYNAMIC_TOKEN, MANY),
    "int4_by_one_scale": ("int4_channel_zp", keys.FP8_STATIC_TENSOR, MANY),
    "iq4_nl_by_fp8": ("iq4_nl", keys.FP8_DYNAMIC_TOKEN, replace(MANY, H=544, I=288)),
    "many_tiles": ("nvfp4", keys.NVFP4_DYNAMIC, replace(MANY, T=6000, H=2048, I=768)),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_rows(name, ran):
    """Rounded as their format has it, in the order in which lanes hold columns; in graphs, too."""
    case = Quantized(*ROUNDED[name])
    tensors = case.layer.tensors()
    run = case.runner(tensors, HopperEmulatedExperts)
    clean = run().clone()
    assert ran
    exact = replace(case, rows=None).expected(tensors)
    assert_no_worse(name, clean, case.expected(tensors).to(clean.dtype), exact)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    tensors["hidden_states"][-1] = float("nan")
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert out[:-1].equal(clean[:-1])
