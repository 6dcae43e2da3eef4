"""Experts on deep_gemm against the definition, on a module that has the package's signatures."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace

import pytest
import torch

import fake_deep_gemm
from expert_layers import Layer
from fusedmoe import MoEActivation, MoEOptions
from fusedmoe.experts import deep_gemm_run
from fusedmoe.experts.deep_gemm import (
    BatchedDeepGemmExperts,
    DeepGemmExperts,
    expected_rows,
    prefers_deep_gemm,
)
from fusedmoe.experts.triton_or_deep_gemm import TritonOrDeepGemmExperts
from fusedmoe.modular_kernel import ExpertTokensMetadata
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.keys import FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0, FP8_DYNAMIC_TOKEN
from fusedmoe.selection import select
from quantized_experts import Quantized
from rounded_experts import (
    assert_rounded,
    check_dead_slots_and_nan_rows,
    check_one_expert_no_local_slot_and_no_tokens,
    check_strange_strides_and_int64_ids,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BF16 = torch.bfloat16
LAYER = Layer(T=7, K=2, E=4, H=256, I=128, dtype=BF16)
PLAIN = Quantized("fp8_block", FP8_DYNAMIC_128, LAYER)
CASES = {
    "plain": PLAIN,
    "ue8m0": replace(PLAIN, rows=FP8_DYNAMIC_128_UE8M0),
    "one_token": replace(PLAIN, layer=replace(LAYER, T=1)),
    "many_rows": replace(PLAIN, layer=replace(LAYER, T=150, E=3)),
    "all_experts": replace(PLAIN, layer=replace(LAYER, K=4)),
    "expert_map": replace(PLAIN, layer=replace(LAYER, E=8, local=3)),
    "few_slots": replace(PLAIN, layer=replace(LAYER, T=1, E=32, local=9)),
    "no_gate": replace(PLAIN, layer=replace(LAYER, activation=MoEActivation.RELU2_NO_MUL)),
    "weight_on_input": replace(PLAIN, layer=replace(LAYER, K=1, weight_on_input=True)),
    "passes": replace(
        PLAIN, layer=replace(LAYER, T=9, options=MoEOptions(max_workspace_bytes=450_000))
    ),
}
BOTH = (DeepGemmExperts, BatchedDeepGemmExperts)


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The module in the package's place, with no calls yet."""
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm)
    fake_deep_gemm.calls.clear()
    return fake_deep_gemm


@pytest.mark.parametrize("experts", BOTH)
@pytest.mark.parametrize("name", CASES)
def test_layers(name, experts, package):
    case = CASES[name]
    tensors = case.layer.tensors()
    assert_rounded(case.run(tensors, experts), case, tensors)
    kinds = {call for call, _ in package.calls}
    assert kinds == {"contiguous" if experts is DeepGemmExperts else "masked"}
    casts = {hints["disable_ue8m0_cast"] for _, hints in package.calls}
    assert casts == {name != "ue8m0"}
    if name == "passes" and experts is DeepGemmExperts:
        assert len(package.calls) > 2


@pytest.mark.parametrize("experts", BOTH)
def test_odd_inputs(experts):
    check_dead_slots_and_nan_rows(replace(PLAIN, layer=replace(LAYER, T=6)), experts)
    check_one_expert_no_local_slot_and_no_tokens(
        replace(PLAIN, layer=replace(LAYER, T=131, K=1)), experts
    )
    check_strange_strides_and_int64_ids(PLAIN, experts)


@pytest.mark.parametrize("experts", [*BOTH, TritonOrDeepGemmExperts])
def test_compiled_without_graph_breaks(experts):
    case = CASES["many_rows"]
    tensors = case.layer.tensors()
    assert case.run(tensors, experts, compiled=True).equal(case.run(tensors, experts))


@pytest.mark.parametrize("experts", BOTH)
def test_rows_that_were_quantized_before_they_came(experts):
    """As a dispatch delivers them: e4m3 with scales, here those of the scheme itself."""
    tensors = LAYER.tensors()
    w1, w2, config = PLAIN.config(tensors)
    batched = experts is BatchedDeepGemmExperts
    one = experts(LAYER.config(), config, *((5, 1) if batched else ()))
    H, e = LAYER.H, LAYER.E
    x = torch.randn(*((e, 5) if batched else (LAYER.T,)), H).to(BF16)
    q, scale = deep_gemm_run.BlockWeights(
        w1.data, config.w1_scale, w2.data, config.w2_scale
    ).quantized(x)
    counts = ExpertTokensMetadata(torch.tensor([5, 0, 2, 1], dtype=torch.int32))
    outs = []
    for rows, given in ((x, None), (q, scale), (q, deep_gemm_run.mn_major(scale))):
        shapes = one.workspace_shapes(x.shape[-2], 2 * LAYER.I, H, 2, e, e, None, LAYER.activation)
        scratch = [torch.empty(shape, dtype=BF16) for shape in shapes]
        weights, ids = tensors["topk_weights"], tensors["topk_ids"]
        one.apply(
            *(scratch[2], rows, w1.data, w2.data, weights, ids, LAYER.activation, e, None),
            *(given, None, scratch[0], scratch[1], counts if batched else None, False),
        )
        outs.append(scratch[2])
    assert all(torch.equal(out.nan_to_num(7), outs[0].nan_to_num(7)) for out in outs)
    assert outs[0][0].isfinite().all()
    with pytest.raises(ValueError, match=r"quantized rows are e4m3 with fp32 scales"):
        one.apply(
            *(scratch[2], q, w1.data, w2.data, weights, ids, LAYER.activation, e, None),
            *(scale[..., :1], None, scratch[0], scratch[1], counts if batched else None, False),
        )


def test_aligned_rows_cover_every_slot_once():
    ids = torch.tensor([[3, 0], [9, 3], [-1, 5], [7, 3]])
    table = torch.tensor([0, -1, -1, 1, -1, -1, -1, 2], dtype=torch.int32)
    rows = deep_gemm_run.aligned_rows(ids, 3, table, 128)
    P = rows.token.shape[0]
    assert deep_gemm_run.aligned_size(8, 3, 128) == P
    assert P % 128 == 0
    assert rows.inverse.tolist() == [128, 0, P, 129, P, P, 256, 130]
    live = rows.expert >= 0
    assert live.nonzero().flatten().tolist() == [0, 128, 129, 130, 256]
    assert rows.expert[live].tolist() == [0, 1, 1, 1, 2]
    assert rows.token[live].tolist() == [0, 0, 1, 3, 3]
    assert ((rows.token >= 0) & (rows.token < 4)).all()


@pytest.mark.parametrize("shape", [(7, 3), (8, 3), (2, 5, 2)])
def test_scales_run_along_the_rows_from_16_bytes_on(shape):
    scale = torch.rand(shape)
    made = deep_gemm_run.mn_major(scale)
    assert torch.equal(made, scale)
    room = -(-shape[-2] // 4) * 4
    assert made.stride()[-2:] == (1, room)
    assert deep_gemm_run.mn_major(made) is made


def test_triton_takes_few_rows_and_deep_gemm_many(package):
    assert [prefers_deep_gemm(R, 4) for R in (0, 8, 255, 256, 9999)] == [False] * 3 + [True] * 2
    assert prefers_deep_gemm(64, 1)
    few, many = PLAIN, CASES["many_rows"]
    for case, called in ((few, 0), (many, 2)):
        package.calls.clear()
        tensors = case.layer.tensors()
        found = case.run(tensors, TritonOrDeepGemmExperts)
        assert len(package.calls) == called
        error = (found.double() - case.expected(tensors)).norm() / case.expected(tensors).norm()
        assert error < 0.02


def test_the_last_pass_may_take_the_other_way(package):
    options = MoEOptions(max_workspace_bytes=500_000)
    case = replace(PLAIN, layer=replace(LAYER, T=140, K=2, E=2, options=options))
    tensors = case.layer.tensors()
    assert_rounded(case.run(tensors, TritonOrDeepGemmExperts), case, tensors, 0.02)
    assert len(package.calls) == 2


def test_expected_rows_is_a_hint_within_bounds():
    assert expected_rows(1024, 8, 256) == 32
    assert expected_rows(3, 1, 256) == 1
    assert expected_rows(5, 8, 4) == 5


def test_absence_is_an_import_error_that_names_the_package(monkeypatch):
    config = PLAIN.config(LAYER.tensors())[2]
    for experts, arguments in ((DeepGemmExperts, ()), (BatchedDeepGemmExperts, (4, 1))):
        monkeypatch.setitem(sys.modules, "deep_gemm", None)
        with pytest.raises(ImportError, match="need the package deep_gemm, version 2"):
            experts(LAYER.config(), config, *arguments)
        old = types.ModuleType("deep_gemm")
        old.m_grouped_fp8_gemm_nt_contiguous = None
        monkeypatch.setitem(sys.modules, "deep_gemm", old)
        with pytest.raises(ImportError, match="installed lacks m_grouped_fp8_gemm_nt_masked"):
            experts(LAYER.config(), config, *arguments)


def test_the_earlier_name_of_the_masked_gemm_will_do(monkeypatch, package):
    names = ("m_grouped_fp8_gemm_nt_contiguous", "get_mk_alignment_for_contiguous_layout")
    earlier = types.SimpleNamespace(**{name: getattr(package, name) for name in names})
    earlier.fp8_m_grouped_gemm_nt_masked = package.m_grouped_fp8_gemm_nt_masked
    monkeypatch.setitem(sys.modules, "deep_gemm", earlier)
    tensors = LAYER.tensors()
    assert_rounded(PLAIN.run(tensors, BatchedDeepGemmExperts), PLAIN, tensors)


class TestSelection:
    """What rules the package out, in the words that ``explain`` prints."""

    @staticmethod
    def reason(monkeypatch, name="deep_gemm", rows=FP8_DYNAMIC_128, capability=(9, 0), **changes):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        layer = replace(LAYER, device="cuda", **changes)
        options = MoEOptions(experts=name)
        key = format_named("fp8_block").key
        try:
            return select(replace(layer.config(), options=options), key, rows).chosen.name
        except ValueError as error:
            return str(error)

    def test_it_is_chosen_by_name(self, monkeypatch):
        for name in ("deep_gemm", "triton_or_deep_gemm"):
            assert self.reason(monkeypatch, name) == name

    def test_absence_is_the_reason(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "deep_gemm")
        for name in ("deep_gemm", "triton_or_deep_gemm"):
            found = self.reason(monkeypatch, name)
            assert "needs the module deep_gemm, which is not installed" in found

    def test_a_layer_that_asks_for_it_by_name_is_an_import_error(self, monkeypatch):
        """Other reasons are not: no package would help."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        key = format_named("fp8_block").key
        config = replace(LAYER, device="cuda").config()
        options = MoEOptions(experts="deep_gemm")
        monkeypatch.delitem(sys.modules, "deep_gemm")
        with pytest.raises(ImportError, match="needs the module deep_gemm, which is not"):
            select(replace(config, options=options), key, FP8_DYNAMIC_128)
        options = MoEOptions(experts="cutlass_fp8")
        with pytest.raises(ValueError, match="does not run weights") as caught:
            select(replace(config, options=options), key, FP8_DYNAMIC_128)
        assert not isinstance(caught.value, ImportError)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"I": 192}, "whole blocks of 128, intermediate_size_per_partition is 192"),
            ({"H": 64}, "hidden_dim is 64"),
            ({"capability": (8, 9)}, r"needs compute capability \(9, 0\)"),
            ({"capability": (10, 0)}, "powers of two as scales on compute capability 10"),
            ({"rows": FP8_DYNAMIC_TOKEN}, "does not run weights"),
            ({"bias": True}, "expert biases"),
            ({"dtype": torch.float16}, "torch.float16"),
            ({"activation": MoEActivation.SWIGLUOAI}, "activation swigluoai"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_reasons(self, monkeypatch, changes, reason):
        for name in ("deep_gemm", "triton_or_deep_gemm"):
            found = self.reason(monkeypatch, name, **changes)
            assert re.search(reason, found), found

    def test_exponents_pass_on_later_gpus(self, monkeypatch):
        changes = {"rows": FP8_DYNAMIC_128_UE8M0, "capability": (10, 0)}
        assert self.reason(monkeypatch, **changes) == "deep_gemm"


def test_scales_that_would_be_cut_are_refused(monkeypatch):
    """From compute capability 10 on, the package keeps the exponent of a scale alone."""
    case = CASES["ue8m0"]
    config = case.config(LAYER.tensors())[2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    moe = replace(LAYER, device="cuda").config()
    with pytest.raises(ValueError, match="w1_scale has scales that are no powers of two"):
        DeepGemmExperts(moe, config).process_weights_after_loading(torch.nn.Module())
    for weight in (config.w1, config.w2):
        weight.scale.copy_(torch.exp2(weight.scale.log2().round()))
    DeepGemmExperts(moe, config).process_weights_after_loading(torch.nn.Module())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": torch.zeros(2, 256, 128)}, r"w1 must be contiguous e4m3 \[e, N, K\], got torch.fl"),
        ({"w1": torch.zeros(2, 200, 128, dtype=torch.float8_e4m3fn)}, "not made of blocks of 128"),
        ({"w1_scale": torch.zeros(2, 2, 2)}, r"w1_scale must be contiguous fp32 \(2, 2, 1\)"),
        ({"w2_scale": torch.zeros(2, 1, 1, dtype=BF16)}, "w2_scale must be contiguous fp32"),
    ],
)
def test_weights_in_another_layout_are_refused(change, message):
    fp8 = torch.float8_e4m3fn
    parts = {
        "w1": torch.zeros(2, 256, 128, dtype=fp8),
        "w1_scale": torch.ones(2, 2, 1),
        "w2": torch.zeros(2, 128, 128, dtype=fp8),
        "w2_scale": torch.ones(2, 1, 1),
    }
    deep_gemm_run.BlockWeights(**parts)
    with pytest.raises(ValueError, match=message):
        deep_gemm_run.BlockWeights(**(parts | change))


def test_missing_parts_are_errors():
    one = DeepGemmExperts(LAYER.config(), FusedMoEQuantConfig())
    with pytest.raises(ValueError, match="need scales per block, found none"):
        one.scales()
    batched = BatchedDeepGemmExperts(LAYER.config(), FusedMoEQuantConfig(), 4, 1)
    rows = torch.zeros(4, 4, 256)
    with pytest.raises(ValueError, match=r"expert_num_tokens \[4\], got None"):
        batched.apply(
            rows, rows, rows, rows, None, None, LAYER.activation, 4, None, None, None, rows, rows,
            None, False,
        )  # fmt: skip
    assert not batched.supports_packed_ue8m0_act_scales()
