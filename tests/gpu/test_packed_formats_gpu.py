"""Formats that take more than a mask, on a GPU: superblocks, six bits, tables, act-order; and rows
of any format, rounded and multiplied as floats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer, error
from fusedmoe import MoEOptions
from fusedmoe.activation import MoEActivation
from fusedmoe.experts import hopper_quantized
from fusedmoe.experts.hopper_quantized import HopperEmulatedExperts, HopperQuantizedExperts
from fusedmoe.experts.triton_quantized import TritonEmulatedExperts, TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_batched import (
    BatchedTritonEmulatedExperts,
    BatchedTritonQuantizedExperts,
)
from fusedmoe.kernels.round_rows import round_rows, round_rows_reference
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP6_E3M2_DYNAMIC,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    NVFP4_STATIC,
)
from quantized_experts import Quantized

pytestmark = pytest.mark.gpu
NAN = float("nan")
BF16 = torch.bfloat16
WEIGHT_ONLY_ERROR = 4e-3
# Up, down, whether the columns of up can be sorted.
FORMATS = {
    "nf4": ("nf4", None, False),
    "iq4_nl": ("iq4_nl", None, False),
    "iq4_nl_wide": ("iq4_nl@float32", None, False),
    "q2_k": ("q2_k", None, False),
    "q3_k": ("q3_k", None, False),
    "q2_k_by_q3_k": ("q2_k", "q3_k", False),
    "q3_k_by_q2_k": ("q3_k", "q2_k", False),
    "q4_1": ("q4_1", None, False),
    "q5_1": ("q5_1", None, False),
    "q5_k_by_q5_1": ("q5_k", "q5_1", False),
    "q4_k": ("q4_k", None, False),
    "q5_k": ("q5_k", None, False),
    "q6_k": ("q6_k", None, False),
    "q4_k_by_q6_k": ("q4_k", "q6_k", False),
    "q5_k_by_int8": ("q5_k", "int8_g32", False),
    "e3m2": ("mxfp6_e3m2", None, False),
    "e2m3": ("mxfp6_e2m3", None, False),
    "sorted": ("int4_g128_act_order", None, True),
    "sorted_zp": ("int4_g32_zp_act_order", None, True),
    "table": ("int4_g128_act_order", None, False),
    "table_int8_zp": ("int8_g32_zp_act_order", None, False),
}
LAYER = Layer(device="cuda", dtype=BF16, T=60, K=4, E=16, H=512, I=256)
LAYERS = {
    "one_token": replace(LAYER, T=1, E=64),
    "few_rows": LAYER,
    "many_rows": replace(LAYER, T=700, E=8, K=2),
    "interleaved": replace(LAYER, activation=MoEActivation.SWIGLUOAI, bias=True),
    "no_gate_map": replace(
        LAYER, activation=MoEActivation.RELU2_NO_MUL, bias=True, T=33, E=32, local=9
    ),
}
EVERYWHERE = ["q2_k_by_q3_k", "q5_k_by_q5_1", "q4_k_by_q6_k", "e3m2", "nf4", "sorted_zp", "table"]
MATRIX = [
    (fmt, layer)
    for layer in LAYERS
    for fmt in (FORMATS if layer in ("one_token", "few_rows") else EVERYWHERE)
]


def case_of(fmt, layer):
    up, down, one_order = FORMATS[fmt]
    return Quantized(up, None, layer, down, one_order)


def runner(case, tensors, experts=TritonQuantizedExperts):
    return case.runner(tensors, experts, prepare=True)


@pytest.mark.parametrize(("fmt", "layer"), MATRIX)
def test_formats(fmt, layer):
    case = case_of(fmt, LAYERS[layer])
    tensors = case.layer.tensors()
    run = runner(case, tensors)
    out = run()
    assert error(out, case.expected(tensors)) <= WEIGHT_ONLY_ERROR
    assert run().equal(out)
    assert (run.experts._sorted is not None) == ("sorted" in fmt or "table" in fmt)
    if "sorted" in fmt:
        assert run.experts._sorted.order is not None


@pytest.mark.parametrize("T", [1, 60, 700])
@pytest.mark.parametrize(("up", "down"), [("q5_k", "q5_1"), ("q3_k", "q4_1"), ("q4_1", "q5_1")])
def test_rows_of_no_whole_number_of_steps(up, down, T):
    case = Quantized(up, None, replace(LAYER, T=T, I=160), down)
    tensors = case.layer.tensors()
    # One token's error is that of few numbers, and of one rounding of act.
    allowed = WEIGHT_ONLY_ERROR if T > 1 else 1.25 * WEIGHT_ONLY_ERROR
    assert error(runner(case, tensors)(), case.expected(tensors)) <= allowed


def test_sorted_weights_take_the_memory_that_they_took():
    case = case_of("sorted", replace(LAYER, E=32, H=2048, I=1024))
    tensors = case.layer.tensors()
    run = case.runner(tensors)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run.prepare()
    run()
    size = sum(w.nbytes for w in run.weights)
    assert torch.cuda.memory_allocated() - before < 0.02 * size
    assert error(run(), case.expected(tensors)) <= WEIGHT_ONLY_ERROR


@pytest.mark.parametrize("fmt", FORMATS)
def test_batches(fmt):
    case = case_of(fmt, replace(LAYER, bias=True))
    tensors = case.layer.tensors()
    out = runner(case, tensors, BatchedTritonQuantizedExperts)()
    assert error(out, case.expected(tensors)) <= WEIGHT_ONLY_ERROR


@pytest.mark.parametrize("fmt", ["q2_k", "q3_k", "q4_k", "q5_1", "nf4", "e2m3", "sorted"])
def test_fp16(fmt):
    case = case_of(fmt, replace(LAYER, dtype=torch.float16))
    tensors = case.layer.tensors()
    assert error(runner(case, tensors)(), case.expected(tensors)) <= 2e-3


@pytest.mark.parametrize("T", [1, 300])
@pytest.mark.parametrize("fmt", EVERYWHERE)
def test_graphs_ids_of_no_expert_and_nan_rows(fmt, T):
    case = case_of(fmt, replace(LAYER, T=T + 1))
    tensors = case.layer.tensors()
    tensors["topk_ids"][0] = torch.tensor([-1, 16, -5, 2**31 - 1])
    run = runner(case, tensors)
    clean = run().clone()
    assert (clean[0] == 0).all()
    assert error(clean, case.expected(tensors)) <= WEIGHT_ONLY_ERROR
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    tensors["hidden_states"][-1] = NAN
    graph.replay()
    assert out[-1].isnan().all()
    assert out[:-1].equal(clean[:-1])


@pytest.mark.parametrize("fmt", EVERYWHERE)
def test_batch_invariance_is_bitwise(fmt):
    layer = replace(LAYER, T=300, options=MoEOptions(batch_invariant=True), bias=True)
    case = case_of(fmt, layer)
    tensors = case.layer.tensors()
    names = ("hidden_states", "topk_weights", "topk_ids")
    given = {name: tensors[name] for name in names}
    run = runner(case, tensors)
    whole = run()
    for part in (slice(0, 1), slice(5, 7), slice(100, 300)):
        tensors |= {name: given[name][part] for name in names}
        assert run().equal(whole[part])


ROUNDED = [
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP6_E3M2_DYNAMIC,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
]


@pytest.mark.parametrize("D", [96, 2048, 14336])
@pytest.mark.parametrize("key", ROUNDED, ids=str)
def test_rows_are_rounded_as_defined(key, D):
    x = torch.randn(33, D, device="cuda", dtype=BF16)
    out, expected = round_rows(x, key), round_rows_reference(x, key)
    assert out.equal(expected)


@pytest.mark.parametrize("experts", [TritonEmulatedExperts, BatchedTritonEmulatedExperts])
@pytest.mark.parametrize(
    ("fmt", "rows"),
    [
        ("int4_g32", FP8_DYNAMIC_TOKEN),
        ("mxfp4", MXFP4_DYNAMIC),
        ("nvfp4", NVFP4_DYNAMIC),
        ("mxfp6_e2m3", MXFP6_E2M3_DYNAMIC),
    ],
    ids=str,
)
def test_emulated_rows(fmt, rows, experts):
    """No worse than a torch computation on the same rounded rows, but for 16-bit rows between."""
    case = Quantized(fmt, rows, LAYER)
    tensors = case.layer.tensors()
    exact = replace(case, rows=None).expected(tensors)
    allowed = 1.05 * error(case.expected(tensors), exact) + WEIGHT_ONLY_ERROR
    assert error(case.run(tensors, experts), exact) <= allowed


FEW = replace(LAYER, T=17, H=1024, I=512)
STREAMED = {
    "nvfp4": Quantized("nvfp4", NVFP4_DYNAMIC, FEW),
    "nvfp4_static": Quantized("nvfp4", NVFP4_STATIC, FEW),
    "mxfp8": Quantized("mxfp8", MXFP8_DYNAMIC, FEW),
    "lone_mxfp4": Quantized("mxfp4", MXFP4_DYNAMIC, replace(FEW, T=1, E=64)),
    "lone_nvfp4": Quantized("nvfp4", NVFP4_DYNAMIC, replace(FEW, T=2, E=64)),
    "whole_rows": Quantized("mxfp4", MXFP4_DYNAMIC, replace(FEW, E=32, H=2880, I=2880)),
    "interleaved": Quantized(
        "mxfp4", MXFP4_DYNAMIC, replace(FEW, activation=MoEActivation.SWIGLUOAI, bias=True)
    ),
    "no_gate_map": Quantized(
        *("int4_channel_zp", FP8_STATIC_TENSOR),
        replace(FEW, activation=MoEActivation.RELU2_NO_MUL, bias=True, E=32, local=9),
    ),
    "second_rows_alone": Quantized("mxfp4", MXFP8_DYNAMIC, FEW, only="w2"),
    "nf4": Quantized("nf4", None, FEW),
    "nf4_one_token": Quantized("nf4", None, replace(FEW, T=1, E=64, H=2048, I=768)),
    "iq4_nl": Quantized("iq4_nl", None, replace(FEW, bias=True, E=32, local=9, I=544)),
    "iq4_nl_wide": Quantized("iq4_nl@float32", None, replace(FEW, H=2048, I=768)),
    "nf4_by_int4": Quantized("nf4", None, replace(FEW, T=30), "int4_g32_zp"),
    "nf4_by_mxfp8": Quantized(
        "nf4", MXFP8_DYNAMIC, replace(FEW, activation=MoEActivation.SWIGLUOAI, bias=True)
    ),
    "sorted": Quantized("int4_g128_act_order", None, FEW, one_order=True),
    "sorted_lone": Quantized(
        *("int4_g32_zp_act_order", None, replace(FEW, T=2, E=64)), one_order=True
    ),
    "sorted_bytes_map": Quantized(
        *("int8_g32_act_order", None, replace(FEW, T=3, bias=True, E=32, local=9)), one_order=True
    ),
    "sorted_by_mxfp8": Quantized("int4_g128_act_order", MXFP8_DYNAMIC, FEW, one_order=True),
}
# Of more rows: sorted columns are followed in blocks of rows, too.
FILLED = {
    "many_sorted": Quantized(
        "int4_g128_act_order", None, replace(FEW, T=700, E=8, K=2), one_order=True
    ),
    "many_sorted_tails": Quantized(
        *("int4_g32_zp_act_order", None, replace(FEW, T=3000, E=8, K=2, bias=True)), one_order=True
    ),
    "many_sorted_bytes_map": Quantized(
        *("int8_g32_act_order", None, replace(FEW, T=500, E=8, local=3, K=2)), one_order=True
    ),
    "many_down_alone": Quantized(
        *("int4_g128", None, replace(FEW, T=700, E=8, K=2), "int4_g128_act_order")
    ),
    "many_by_mxfp8": Quantized(
        *("int4_g128_act_order", MXFP8_DYNAMIC, replace(FEW, T=700, E=8, K=2)), one_order=True
    ),
}


@pytest.mark.parametrize("name", STREAMED | FILLED)
def test_rows_on_hoppers_own_units(name, monkeypatch):
    """Rows that are rounded to a format, rows whose columns follow sorted ones, and numbers from a
    table: no worse than a torch computation on the same rows; the same bits in graphs, in which a
    row of NaN is its own, and so is a token without an expert."""
    launcher = "quantized_decode" if name in STREAMED else "mixed_prefill"
    ran, launch = [], getattr(hopper_quantized, launcher)
    monkeypatch.setattr(
        hopper_quantized, launcher, lambda *given, **more: (ran.append(1), launch(*given, **more))
    )
    case = (STREAMED | FILLED)[name]
    tensors = case.layer.tensors()
    experts = HopperQuantizedExperts if case.rows is None else HopperEmulatedExperts
    run = case.runner(tensors, experts, prepare=True)
    exact = replace(case, rows=None).expected(tensors)
    allowed = 1.05 * error(case.expected(tensors), exact) + WEIGHT_ONLY_ERROR
    assert error(run(), exact) <= allowed
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    assert len(ran) == 2
    tensors["topk_ids"][0] = -1
    clean = run().clone()
    if case.layer.T > 1:
        tensors["hidden_states"][-1] = NAN
    for _ in range(3):
        out.fill_(NAN)
        graph.replay()
        assert out[1:-1].equal(clean[1:-1])
        assert not out[0].any()


@pytest.mark.parametrize("experts", [TritonQuantizedExperts, BatchedTritonQuantizedExperts])
@pytest.mark.parametrize("T", [1, 60, 700])
@pytest.mark.parametrize("fmt", ["int4_g128", "int4_g64_zp", "int4_channel"])
def test_int4_by_fp8(fmt, T, experts):
    """Few slots in 16 bits, many in fp8."""
    case = Quantized(fmt, FP8_DYNAMIC_TOKEN, replace(LAYER, T=T, bias=True))
    tensors = case.layer.tensors()
    exact = replace(case, rows=None).expected(tensors)
    allowed = 1.05 * error(case.expected(tensors), exact) + WEIGHT_ONLY_ERROR
    out = case.run(tensors, experts)
    assert error(out, exact) <= allowed
    assert case.run(tensors, experts).equal(out)
