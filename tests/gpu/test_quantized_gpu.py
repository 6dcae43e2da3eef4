"""Quantized experts on a GPU: every format, few and many rows, graphs, compilation, odd inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer, error
from fusedmoe import MoEOptions
from fusedmoe.activation import MoEActivation
from fusedmoe.experts import hopper_quantized
from fusedmoe.experts.hopper_quantized import HopperQuantizedExperts
from fusedmoe.experts.triton_quantized import TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_batched import BatchedTritonQuantizedExperts
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.kernels.hopper_fp8_prefill import fp8_prefill
from fusedmoe.kernels.quantize import quantize_rows, quantize_rows_reference
from fusedmoe.quantization.activations import spread
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP8_DYNAMIC,
)
from fusedmoe.tuning.quantized_tiles import QuantizedPrefillTiles
from quantized_experts import Quantized

pytestmark = pytest.mark.gpu
NAN = float("nan")
BF16 = torch.bfloat16
# Relative Frobenius error against fp64 on the dequantized weights, of 16-bit rows.
WEIGHT_ONLY_ERROR = 4e-3
FORMATS = [
    *(("int4_g32", None), ("int4_g32_zp", None), ("int4_g64", None), ("int4_g128", None)),
    *(("int4_g128_zp", None), ("int4_channel", None), ("int8_channel", None)),
    *(("int8_g32", None), ("mxfp4", None), ("nvfp4", None), ("mxfp8", None)),
    *(("fp8_tensor", None), ("fp8_channel", None), ("fp8_block", None)),
    *(("fp8_block", FP8_DYNAMIC_128), ("fp8_block", FP8_DYNAMIC_128_UE8M0)),
    *(("fp8_channel", FP8_DYNAMIC_TOKEN), ("fp8_tensor", FP8_DYNAMIC_TENSOR)),
    *(("fp8_tensor", FP8_STATIC_TENSOR), ("int8_channel", INT8_DYNAMIC_TOKEN)),
    *(("int8_channel", INT8_STATIC_TENSOR), ("mxfp8", MXFP8_DYNAMIC)),
]
LAYER = Layer(device="cuda", dtype=BF16, T=60, K=4, E=16, H=256, I=256)
LAYERS = {
    "one_token": replace(LAYER, T=1, E=64),
    "two_tokens": replace(LAYER, T=2, E=64, bias=True),
    "few_rows": LAYER,
    "many_rows": replace(LAYER, T=700, E=8, K=2),
    "gpt_oss": replace(LAYER, activation=MoEActivation.SWIGLUOAI, bias=True, H=288 * 2, I=192 * 2),
    "no_gate": replace(LAYER, activation=MoEActivation.RELU2_NO_MUL, bias=True, T=33),
    "expert_map": replace(LAYER, E=32, local=9),
    "one_token_map": replace(LAYER, T=1, E=64, local=20),
    "few_tokens_of_a_rank": replace(LAYER, T=4, E=64, local=20, bias=True),
}
CLASSES = [TritonQuantizedExperts, HopperQuantizedExperts]
# Rows that the Hopper experts prefill, with weights in 8 bits as well.
PREFILLED = [
    *(FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR),
    *(INT8_DYNAMIC_TOKEN, INT8_STATIC_TENSOR),
]
# Every format in three layers, four formats in all.
EVERYWHERE = [
    *(("int4_g32_zp", None), ("mxfp4", None), ("fp8_block", FP8_DYNAMIC_128)),
    ("int8_channel", INT8_DYNAMIC_TOKEN),
]
MATRIX = [
    (*fmt, name)
    for name in LAYERS
    for fmt in (FORMATS if name in ("one_token", "few_rows", "many_rows") else EVERYWHERE)
]


def fitting(case):
    """Sizes that the format's groups divide."""
    layer, group = case.layer, format_named(case.format).group.col
    if group <= 0 or (format_named(case.format).element == "e4m3" and group == 128):
        return case
    H, I = (-(-size // group) * group for size in (layer.H, layer.I))  # noqa: E741
    return replace(case, layer=replace(layer, H=H, I=I))


def exact(case, tensors):
    """The layer in fp64 on the dequantized weights, rows as they come."""
    return replace(case, rows=None).expected(tensors)


def assert_right(case, out, tensors):
    truth = exact(case, tensors)
    allowed = WEIGHT_ONLY_ERROR
    if case.rows is not None:
        allowed += 1.05 * error(case.expected(tensors), truth)
    assert error(out, truth) <= allowed, (error(out, truth), allowed)


@pytest.mark.parametrize("experts", CLASSES)
@pytest.mark.parametrize(("fmt", "rows", "name"), MATRIX, ids=str)
def test_formats(fmt, rows, name, experts):
    elsewhere = rows is not None and rows not in PREFILLED
    if experts is HopperQuantizedExperts and name == "many_rows" and elsewhere:
        pytest.skip("runs the Triton experts' way")
    case = fitting(Quantized(fmt, rows, LAYERS[name]))
    tensors = case.layer.tensors()
    out = case.run(tensors, experts)
    assert_right(case, out, tensors)
    assert case.run(tensors, experts).equal(out)


MANY = replace(LAYER, T=700, E=8, K=2, H=768, I=512)
PREFILL_LAYERS = {
    "odd_sizes": replace(MANY, H=272, I=144, bias=True),
    "gpt_oss": replace(MANY, activation=MoEActivation.SWIGLUOAI, bias=True, H=576, I=384),
    "no_gate": replace(MANY, activation=MoEActivation.RELU2_NO_MUL, bias=True, I=640),
    "expert_map": replace(MANY, E=16, local=5, T=900),
    "uneven": replace(MANY, E=3, T=97),
    "many_tiles": replace(MANY, T=6000, H=2048, I=768),
}


def count_prefills(monkeypatch):
    ran = []

    def run(*args, **kwargs):
        ran.append(1)
        fp8_prefill(*args, **kwargs)

    monkeypatch.setattr(hopper_quantized, "fp8_prefill", run)
    return ran


@pytest.mark.parametrize("name", PREFILL_LAYERS)
@pytest.mark.parametrize(
    ("fmt", "rows"), [(fmt, rows) for fmt, rows in FORMATS if rows in PREFILLED], ids=str
)
def test_prefill(fmt, rows, name, monkeypatch):
    ran = count_prefills(monkeypatch)
    case = Quantized(fmt, rows, PREFILL_LAYERS[name])
    tensors = case.layer.tensors()
    out = case.run(tensors, HopperQuantizedExperts)
    assert ran
    assert_right(case, out, tensors)
    assert case.run(tensors, HopperQuantizedExperts).equal(out)


@pytest.mark.parametrize("empty", [0, 5])
@pytest.mark.parametrize(
    ("fmt", "rows"), [(fmt, rows) for fmt, rows in FORMATS if rows in PREFILLED], ids=str
)
def test_prefill_of_few_rows_each(fmt, rows, empty, monkeypatch):
    """Rows of act and y are moved by sixteens; here some blocks are full, some nearly empty."""
    ran = count_prefills(monkeypatch)
    case = Quantized(fmt, rows, replace(MANY, T=200, E=8, H=640))
    tensors = case.layer.tensors()
    ids = tensors["topk_ids"]
    ids[ids == empty] = 2
    ids[30:170, 0] = 2
    out = case.run(tensors, HopperQuantizedExperts)
    assert ran
    assert_right(case, out, tensors)
    assert case.run(tensors, HopperQuantizedExperts).equal(out)


def test_promoted_sums_of_one_sign_do_not_shrink(monkeypatch):
    case = Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, replace(MANY, H=4096, I=256))
    tensors = case.layer.tensors()
    for name in ("hidden_states", "w1", "w2"):
        tensors[name] = tensors[name].abs()
    found = []
    for steps in (0, 1, 2):
        tiles = QuantizedPrefillTiles(promoted=(steps, steps))
        monkeypatch.setattr(HopperQuantizedExperts, "prefill_tiles", tiles)
        found.append(error(case.run(tensors, HopperQuantizedExperts), case.expected(tensors)))
    assert max(found[1:]) < min(1e-2, found[0] / 2), found


@pytest.mark.parametrize(
    ("fmt", "rows"), [("fp8_block", FP8_DYNAMIC_128), ("int8_channel", INT8_DYNAMIC_TOKEN)]
)
def test_prefill_in_a_graph_with_no_expert_and_nan_rows(fmt, rows, monkeypatch):
    ran = count_prefills(monkeypatch)
    case = Quantized(fmt, rows, MANY)
    tensors = case.layer.tensors()
    tensors["topk_ids"][0], tensors["topk_ids"][1] = -1, 2**31 - 1
    run = case.runner(tensors, HopperQuantizedExperts)
    clean = run().clone()
    assert ran
    assert (clean[:2] == 0).all()
    assert_right(case, clean, tensors)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run()
    tensors["hidden_states"][-1] = NAN
    graph.replay()
    assert out[:-1].equal(clean[:-1])
    if rows == FP8_DYNAMIC_128:
        assert out[-1].isnan().all()


@pytest.mark.parametrize(("fmt", "rows"), FORMATS, ids=str)
def test_batched_formats(fmt, rows):
    case = fitting(Quantized(fmt, rows, replace(LAYER, bias=True)))
    tensors = case.layer.tensors()
    assert_right(case, case.run(tensors, BatchedTritonQuantizedExperts), tensors)


@pytest.mark.parametrize("fmt", ["int4_g32_zp", "mxfp4", "fp8_block"])
def test_fp16(fmt):
    case = Quantized(fmt, None, replace(LAYER, dtype=torch.float16))
    tensors = case.layer.tensors()
    assert error(case.run(tensors), exact(case, tensors)) < 2e-3


@pytest.mark.parametrize("experts", CLASSES)
@pytest.mark.parametrize("T", [1, 60])
@pytest.mark.parametrize(("fmt", "width"), [("mxfp4", 32), ("nvfp4", 16), ("int4_g32", 32)])
def test_rows_of_one_group(fmt, width, T, experts):
    case = Quantized(fmt, None, replace(LAYER, T=T, I=width))
    tensors = case.layer.tensors()
    assert_right(case, case.run(tensors, experts), tensors)


@pytest.mark.parametrize("experts", CLASSES)
@pytest.mark.parametrize("T", [1, 50])
@pytest.mark.parametrize(("fmt", "rows"), [("int4_g128", None), ("fp8_block", FP8_DYNAMIC_128)])
def test_graph_replay_follows_new_routing(fmt, rows, T, experts):
    case = Quantized(fmt, rows, replace(LAYER, T=T, E=64))
    tensors = case.layer.tensors()
    run = case.runner(tensors, experts)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in (1, 2):
        other = replace(case.layer, seed=seed).tensors()
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            tensors[name].copy_(other[name])
        out.fill_(NAN)
        graph.replay()
        assert out.equal(run())
        assert_right(case, out, tensors)


@pytest.mark.parametrize("experts", CLASSES)
@pytest.mark.parametrize("T", [1, 6, 300])
def test_ids_of_no_expert_and_nan_rows(T, experts):
    case = Quantized("mxfp4", None, replace(LAYER, T=T))
    tensors = case.layer.tensors()
    tensors["topk_ids"][0] = torch.tensor([-1, 16, -5, 2**31 - 1])
    clean = case.run(tensors, experts)
    assert (clean[0] == 0).all()
    assert_right(case, clean, tensors)
    if T > 1:
        tensors["hidden_states"][-1] = NAN
        dirty = case.run(tensors, experts)
        assert dirty[-1].isnan().all()
        assert dirty[:-1].equal(clean[:-1])


@pytest.mark.parametrize("experts", CLASSES)
@pytest.mark.parametrize(("fmt", "rows"), [("int4_g32", None), ("fp8_block", FP8_DYNAMIC_128)])
def test_batch_invariance_is_bitwise(fmt, rows, experts):
    layer = replace(LAYER, T=300, options=MoEOptions(batch_invariant=True), bias=True)
    case = Quantized(fmt, rows, layer)
    tensors = case.layer.tensors()
    whole = case.run(tensors, experts)
    for part in (slice(0, 1), slice(5, 7), slice(100, 300)):
        rest = {n: tensors[n][part] for n in ("hidden_states", "topk_weights", "topk_ids")}
        assert case.run(tensors | rest, experts).equal(whole[part])


def test_compiled_without_graph_breaks():
    case = Quantized("int4_g128", None, LAYER)
    tensors = case.layer.tensors()
    assert case.run(tensors, compiled=True).equal(case.run(tensors))


@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_128, INT8_DYNAMIC_TOKEN], ids=str)
@pytest.mark.parametrize("D", [96, 2048, 14336])
def test_rows_are_rounded_as_defined(key, D):
    """The same scales; elements differ by a step at most, and where x / scale is nearly a tie: of a
    group whose largest value is a power of two those are many."""
    torch.manual_seed(0)
    x = torch.randn(33, D, device="cuda", dtype=BF16)
    q, scale = quantize_rows(x, key)
    expected, expected_scale = quantize_rows_reference(x, key)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0.0)
    assert (q.float() != expected.float()).float().mean() < 1e-2
    value = q.float() * spread(scale, key, D)
    step = spread(scale, key, D)
    if key.dtype != torch.int8:
        step = torch.maximum(step / 512, x.float().abs() / 8)
    assert ((value - x.float()).abs() <= 0.51 * step + 1e-6).all()


def test_unquantized_rows_agree_with_the_unquantized_layer():
    """The reference itself, once: dequantized weights through the unquantized definition."""
    case = Quantized("int8_channel", None, LAYER)
    tensors = case.layer.tensors()
    w1, w2, _ = case.config(tensors)
    plain = experts_reference(
        tensors["hidden_states"].double(),
        w1.dequantize(torch.float64),
        w2.dequantize(torch.float64),
        tensors["topk_weights"].double(),
        tensors["topk_ids"],
        activation=case.layer.activation,
        compute_dtype=torch.float64,
    )
    assert error(exact(case, tensors), plain) < 1e-9
