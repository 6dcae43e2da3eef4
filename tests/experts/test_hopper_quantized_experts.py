"""What leads to the streaming and the prefill kernels, on CPU tensors: their references run."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe import MoEOptions
from fusedmoe.activation import MoEActivation
from fusedmoe.experts import hopper_quantized
from fusedmoe.experts.hopper_quantized import HopperEmulatedExperts, HopperQuantizedExperts
from fusedmoe.experts.hopper_quantized_choice import runs_decode
from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.kernels.hopper_mixed_prefill import mixed_prefill_rows
from fusedmoe.kernels.hopper_prefill import prefill_rows
from fusedmoe.modular_kernel import PrepareResult
from fusedmoe.prepare_finalize.luggage import quantize_input
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.config import FusedMoEQuantConfig, FusedMoEQuantDesc
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    GroupShape,
)
from fusedmoe.testing import assert_no_worse
from fusedmoe.testing.tolerances import relative_error
from fusedmoe.tuning.mixed_tiles import mixed_prefill_tiles
from fusedmoe.tuning.quantized_tiles import expected_slots
from quantized_experts import Quantized

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BF16 = Layer(H=64, I=32, dtype=torch.bfloat16)
WIDE = replace(BF16, H=256, I=128)
STREAMED = {
    "int4": Quantized("int4_g32", layer=BF16),
    "lone_slots_map": Quantized("int4_g32_zp", layer=replace(BF16, T=1, E=32, local=9)),
    "gpt_oss": Quantized(
        "mxfp4", layer=replace(BF16, activation=MoEActivation.SWIGLUOAI, bias=True)
    ),
    "no_gate": Quantized("nvfp4", layer=replace(BF16, activation=MoEActivation.RELU2_NO_MUL)),
    "weight_on_input": Quantized("int8_channel", layer=replace(BF16, K=1, weight_on_input=True)),
    "nf4": Quantized("nf4", layer=WIDE),
    "nf4_by_int4": Quantized("nf4", layer=replace(WIDE, bias=True), down="int4_g32"),
    "fp8_block": Quantized("fp8_block", FP8_DYNAMIC_128, WIDE),
    "fp8_token": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, replace(WIDE, E=8, local=3)),
    "int8_token": Quantized("int8_channel", INT8_DYNAMIC_TOKEN, replace(BF16, bias=True)),
}
MANY = replace(WIDE, T=100, E=3, K=2)
FILLED = {
    "block": Quantized("fp8_block", FP8_DYNAMIC_128, MANY),
    "half_empty": Quantized("fp8_block", FP8_DYNAMIC_128, replace(MANY, T=24)),
    "block_odd": Quantized(
        "fp8_block", FP8_DYNAMIC_128_UE8M0, replace(MANY, H=272, I=144, bias=True)
    ),
    "gpt_oss": Quantized(
        "fp8_block",
        FP8_DYNAMIC_128,
        replace(MANY, activation=MoEActivation.SWIGLUOAI, bias=True, I=256),
    ),
    "no_gate": Quantized(
        "fp8_block", FP8_DYNAMIC_128, replace(MANY, activation=MoEActivation.RELU2_NO_MUL)
    ),
    "token_map": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, replace(MANY, T=300, E=8, local=3)),
    "tensor": Quantized("fp8_tensor", FP8_STATIC_TENSOR, MANY),
    "int8": Quantized(
        "int8_channel", INT8_DYNAMIC_TOKEN, replace(MANY, weight_on_input=True, K=1, T=200)
    ),
}
ELSEWHERE = {
    "many_rows": Quantized("int4_g32", layer=replace(BF16, T=60, E=3)),
    "batch_invariant": Quantized(
        "int4_g32", layer=replace(BF16, options=MoEOptions(batch_invariant=True))
    ),
    "fp16": Quantized("int4_g32", layer=replace(BF16, dtype=torch.float16)),
    "narrow_rows": Quantized("int8_channel", layer=replace(BF16, I=24)),
    "one_scale_for_all_rows": Quantized("fp8_tensor", FP8_DYNAMIC_TENSOR, MANY),
    "other_pairs": Quantized("fp8_block", FP8_DYNAMIC_TOKEN, WIDE),
    "rows_of_one_product": Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, WIDE, only="w2"),
}


ROUNDED = {
    "nvfp4": Quantized("nvfp4", NVFP4_DYNAMIC, WIDE),
    "mxfp8_map": Quantized("mxfp8", MXFP8_DYNAMIC, replace(WIDE, E=8, local=3)),
    "one_scale": Quantized("int4_channel", FP8_STATIC_TENSOR, replace(WIDE, bias=True)),
    "first_rows_alone": Quantized("mxfp4", MXFP8_DYNAMIC, WIDE, only="w1"),
    "second_rows_alone": Quantized("mxfp4", MXFP8_DYNAMIC, WIDE, only="w2"),
}


ORDERED = {
    "int4": Quantized("int4_g32_act_order", layer=WIDE, one_order=True),
    "zero_points_map": Quantized(
        "int4_g32_zp_act_order", layer=replace(WIDE, E=8, local=3, bias=True), one_order=True
    ),
    "bytes": Quantized("int8_g32_act_order", layer=replace(WIDE, T=2, K=2, E=8), one_order=True),
    "up_alone": Quantized("int4_g32_act_order", layer=WIDE, down="int8_channel", one_order=True),
    "down_alone": Quantized("nf4", layer=WIDE, down="int4_g32_act_order"),
    "rounded": Quantized("int4_g32_act_order", MXFP8_DYNAMIC, WIDE, one_order=True),
}


@pytest.fixture
def streamed(monkeypatch):
    """Which of the launchers ran."""
    ran = []
    for name in ("quantized_decode", "w8a8_decode", "fp8_prefill"):
        launcher = getattr(hopper_quantized, name)

        def run(*args, launcher=launcher, **kwargs):
            ran.append(launcher.__name__)
            launcher(*args, **kwargs)

        monkeypatch.setattr(hopper_quantized, name, run)
    monkeypatch.setattr(hopper_quantized, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(hopper_quantized, "multiprocessors_of", lambda device: 132)
    return ran


def error(case, tensors):
    out, expected = case.run(tensors, HopperQuantizedExperts).double(), case.expected(tensors)
    assert not out.isnan().any()
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", STREAMED)
def test_few_rows_stream(name, streamed):
    case = STREAMED[name]
    tolerance = 6e-3 if case.rows is None else 3e-2
    assert error(case, case.layer.tensors()) < tolerance
    assert streamed == ["quantized_decode" if case.rows is None else "w8a8_decode"]


@pytest.mark.parametrize("name", ROUNDED)
def test_few_rounded_rows_stream_as_floats(name, streamed):
    """Those that enter one product, or both: neither is left as it comes."""
    case = ROUNDED[name]
    tensors = case.layer.tensors()
    out, computed = case.run(tensors, HopperEmulatedExperts), case.expected(tensors)
    exact = replace(case, rows=None).expected(tensors)
    assert streamed == ["quantized_decode"]
    assert_no_worse(name, out, computed.to(out.dtype), exact)
    assert relative_error(out, computed).frobenius < 0.8 * relative_error(out, exact).frobenius


@pytest.mark.parametrize("name", ORDERED)
def test_few_rows_follow_sorted_columns(name, streamed):
    case = ORDERED[name]
    tensors = case.layer.tensors()
    experts = HopperQuantizedExperts if case.rows is None else HopperEmulatedExperts
    out = case.runner(tensors, experts, prepare=True)().double()
    expected = case.expected(tensors)
    assert streamed == ["quantized_decode"]
    assert float((out - expected).norm() / expected.norm()) < (6e-3 if case.rows is None else 3e-2)


def test_columns_that_cannot_be_sorted_go_the_triton_experts_way(streamed):
    case = Quantized("int4_g32_act_order", layer=WIDE)  # gate and up have orders of their own
    tensors = case.layer.tensors()
    out = case.runner(tensors, HopperQuantizedExperts, prepare=True)().double()
    expected = case.expected(tensors)
    assert not streamed
    assert float((out - expected).norm() / expected.norm()) < 6e-3


@pytest.mark.parametrize(("T", "ran"), [(12, ["quantized_decode"]), (13, [])])
def test_rounded_rows_stream_as_long_as_they_are_taken_in_their_order(T, ran, streamed):
    case = replace(ROUNDED["nvfp4"], layer=replace(WIDE, T=T))  # of 4 experts, 2 picks each
    assert not case.run(case.layer.tensors(), HopperEmulatedExperts).isnan().any()
    assert streamed == ran


@pytest.mark.parametrize("name", FILLED)
def test_many_rows_of_8_bits_fill_tiles(name, streamed):
    case = FILLED[name]
    assert error(case, case.layer.tensors()) < 3e-2
    assert streamed == ["fp8_prefill"]


@pytest.mark.parametrize(("name", "ran"), [("block", ["fp8_prefill"]), ("token_map", [])])
def test_rows_that_were_rounded_before_they_travelled(name, ran, streamed, monkeypatch):
    """The same bits where the kernel takes them; a scale per row goes the Triton experts' way."""
    case = FILLED[name]
    tensors = case.layer.tensors()
    whole = case.run(tensors, HopperQuantizedExperts)
    streamed.clear()

    def rounded(self, a1, *others):
        return PrepareResult(*quantize_input(a1, others[5]))

    monkeypatch.setattr(MoEPrepareAndFinalizeNoDPEPModular, "prepare", rounded)
    found = case.run(tensors, HopperQuantizedExperts)
    assert streamed == ran
    assert error(case, tensors) < 3e-2
    assert torch.equal(found, whole) == bool(ran)


def test_many_rows_without_an_expert_and_nan_rows(streamed):
    case = FILLED["block"]
    tensors = case.layer.tensors()
    tensors["topk_ids"][0] = torch.tensor([-1, -1])
    clean = case.run(tensors, HopperQuantizedExperts)
    assert (clean[0] == 0).all()
    tensors["hidden_states"][-1] = float("nan")
    dirty = case.run(tensors, HopperQuantizedExperts)
    assert dirty[-1].isnan().all()
    assert dirty[:-1].equal(clean[:-1])
    assert streamed == ["fp8_prefill"] * 2


@pytest.mark.parametrize("name", ELSEWHERE)
def test_everything_else_takes_the_triton_experts_way(name, streamed):
    case = ELSEWHERE[name]
    assert error(case, case.layer.tensors()) < (6e-3 if case.rows is None else 3e-2)
    assert not streamed


def test_it_is_for_compute_capability_9_and_bf16(monkeypatch):
    moe = replace(BF16.config(), device=torch.device("cuda"))
    weight, rows = format_named("int4_g32").key, HopperQuantizedExperts.activation_format()
    for capability, word in (((9, 0), None), ((10, 0), "9"), ((8, 9), "compute capability")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(hopper_quantized, "missing_nvrtc", lambda: None)
        found, reason = HopperQuantizedExperts.is_supported_config(moe, weight, None, rows)
        assert found == (word is None), reason
        assert word is None or word in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    many = replace(moe, num_experts=2048, num_local_experts=2048, experts_per_token=1024)
    found, reason = HopperQuantizedExperts.is_supported_config(many, weight, None, rows)
    assert not found
    assert "picks" in reason
    half = replace(moe, in_dtype=torch.float16)
    assert not HopperQuantizedExperts.is_supported_config(half, weight, None, rows)[0]


def test_a_rank_of_several_counts_the_slots_that_meet_its_experts():
    """All experts' slots arrive at a rank that holds an eighth of them: few of them are its own."""
    w1 = quantize(torch.zeros(4, 256, 256), format_named("int4_g128"), shards=2)
    w2 = quantize(torch.zeros(4, 256, 128), format_named("int4_g128"))
    x = torch.zeros(64, 256, dtype=torch.bfloat16)
    R = 64 * 8  # 16 for each of 32 experts, 128 for each of the 4 here if all were its own
    assert runs_decode(R, 32, Operands(w1, w2), x, None)
    assert not runs_decode(R, 4, Operands(w1, w2), x, None)
    assert [expected_slots(512, 4, E) for E in (4, 32, 33)] == [512, 64, 63]
    assert expected_slots(1, 1, 256) == 1


def test_workspaces_follow_from_sizes():
    def of(name, **rows):
        weight = FusedMoEQuantDesc(format=format_named(name))
        config = FusedMoEQuantConfig(w1=weight, w2=weight, **rows)
        return HopperQuantizedExperts(BF16.config(), config)

    experts = of("int4_g32")
    act = MoEActivation.SILU
    assert experts.workspace_shapes(7, 64, 64, 2, 4, 4, None, act).workspace2 == (7, 2, 128)
    shapes = experts.workspace_shapes(9000, 64, 64, 2, 4, 4, None, act)
    P = mixed_prefill_rows(18000, 4, mixed_prefill_tiles(18000, 4, (4, 4)))
    # In fp32, for the Triton experts where the prefill cannot run; larger than its blocks' rows.
    assert shapes == ((P, 32), (9000, 2, 128), (9000, 64))
    shapes = of("q4_k").workspace_shapes(9000, 64, 64, 2, 4, 4, None, act)
    assert shapes == ((P, 32), (P, 128), (9000, 64))
    rows = FusedMoEQuantDesc(dtype=torch.float8_e4m3fn, shape=GroupShape(1, 128))
    # Rows of one product alone are rounded: both products are those of floats.
    for name in ("a1", "a2"):
        sizes = 9000, 64, 64, 2, 4, 4, None, act
        assert of("q4_k", **{name: rows}).workspace_shapes(*sizes) == shapes
    config = FusedMoEQuantConfig(a1=rows, a2=rows)
    experts = HopperQuantizedExperts(BF16.config(), config)
    shapes = experts.workspace_shapes(9000, 64, 64, 2, 4, 4, None, act)
    P = prefill_rows(18000, 4)
    assert shapes == ((P, 32), (P, 64), (9000, 64))
