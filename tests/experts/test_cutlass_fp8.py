"""fp8 experts on torch's grouped scaled GEMM, which no CPU has: a function with its signature
checks what torch's own fake kernel checks, and more, and computes the definition."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import ScalingType

from expert_layers import Layer
from fusedmoe import MoEActivation, MoEOptions
from fusedmoe.experts import cutlass_fp8_run
from fusedmoe.experts.cutlass_fp8 import CutlassBatchedExpertsFp8, CutlassExpertsFp8
from fusedmoe.modular_kernel import ExpertTokensMetadata
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
)
from fusedmoe.selection import select
from quantized_experts import Quantized
from rounded_experts import (
    assert_rounded,
    check_dead_slots_and_nan_rows,
    check_one_expert_no_local_slot_and_no_tokens,
    check_strange_strides_and_int64_ids,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
LAYER = Layer(T=7, K=2, E=4, H=64, I=48, dtype=BF16)
PLAIN = Quantized("fp8_channel", FP8_DYNAMIC_TOKEN, LAYER)
CASES = {
    "channel": PLAIN,
    "tensor": Quantized("fp8_tensor", FP8_DYNAMIC_TOKEN, LAYER),
    "tensor_static": Quantized("fp8_tensor", FP8_STATIC_TENSOR, LAYER),
    "channel_static": Quantized("fp8_channel", FP8_STATIC_TENSOR, LAYER),
    "tensor_dynamic": Quantized("fp8_tensor", FP8_DYNAMIC_TENSOR, LAYER),
    "dynamic_map": Quantized("fp8_tensor", FP8_DYNAMIC_TENSOR, replace(LAYER, E=8, local=3)),
    "interleaved": Quantized(
        "fp8_tensor", FP8_DYNAMIC_TOKEN, replace(LAYER, activation=MoEActivation.SWIGLUOAI)
    ),
    "no_gate": replace(PLAIN, layer=replace(LAYER, activation=MoEActivation.RELU2_NO_MUL)),
    "one_token": replace(PLAIN, layer=replace(LAYER, T=1)),
    "all_experts": replace(PLAIN, layer=replace(LAYER, K=4)),
    "expert_map": replace(PLAIN, layer=replace(LAYER, E=8, local=3)),
    "few_slots": replace(PLAIN, layer=replace(LAYER, T=1, E=32, local=9)),
    "weight_on_input": replace(PLAIN, layer=replace(LAYER, K=1, weight_on_input=True)),
    "passes": replace(PLAIN, layer=replace(LAYER, options=MoEOptions(max_workspace_bytes=700))),
}
BOTH = (CutlassExpertsFp8, CutlassBatchedExpertsFp8)


def scaled_grouped_mm(
    mat_a,
    mat_b,
    scale_a,
    scale_recipe_a,
    scale_b,
    scale_recipe_b,
    swizzle_a=None,
    swizzle_b=None,
    bias=None,
    offs=None,
    output_dtype=torch.bfloat16,
    contraction_dim=(),
    use_fast_accum=False,
):
    assert scale_recipe_a is scale_recipe_b is ScalingType.RowWise
    assert swizzle_a is swizzle_b is bias is None
    assert output_dtype is BF16
    meta = [None if t is None else t.to("meta") for t in (mat_a, mat_b, scale_a, scale_b, offs)]
    checked = torch._scaled_grouped_mm(*meta[:4], offs=meta[4], out_dtype=output_dtype)
    e, K, N = mat_b.shape
    assert mat_b.stride() == (N * K, 1, K)
    assert mat_a.is_contiguous()
    assert (scale_a.shape, scale_b.shape) == (mat_a.shape[:-1], (e, N))
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    assert N % 8 == 0, "rows of the output begin at 16 bytes"
    out = torch.full(checked.shape, torch.nan, dtype=BF16)
    if offs is None:
        assert mat_a.shape[0] == e
        spans = [(g, g) for g in range(e)]
    else:
        ends = offs.tolist()
        assert offs.dtype is torch.int32
        assert ends == sorted(ends)
        assert ends[-1] <= mat_a.shape[0]
        spans = [
            (g, slice(start, end))
            for g, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        ]
    for g, rows in spans:
        dot = mat_a[rows].float() @ mat_b[g].float()
        out[rows] = (dot * scale_a[rows][:, None] * scale_b[g]).to(BF16)
    return out


@pytest.fixture(autouse=True)
def gemm(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", scaled_grouped_mm)


def cases(experts):
    batched = experts is CutlassBatchedExpertsFp8
    return [n for n, c in CASES.items() if not (batched and c.rows == FP8_DYNAMIC_TENSOR)]


@pytest.mark.parametrize(("experts", "name"), [(cls, n) for cls in BOTH for n in cases(cls)])
def test_layers(experts, name):
    case = CASES[name]
    tensors = case.layer.tensors()
    assert_rounded(case.run(tensors, experts), case, tensors)


@pytest.mark.parametrize("experts", BOTH)
def test_odd_inputs(experts):
    check_dead_slots_and_nan_rows(replace(PLAIN, layer=replace(LAYER, T=6)), experts)
    check_one_expert_no_local_slot_and_no_tokens(
        replace(PLAIN, layer=replace(LAYER, T=37, K=1)), experts
    )
    check_strange_strides_and_int64_ids(PLAIN, experts)


@pytest.mark.parametrize("experts", BOTH)
@pytest.mark.parametrize("name", ["channel", "tensor_static"])
def test_compiled_without_graph_breaks(experts, name):
    case = CASES[name]
    tensors = case.layer.tensors()
    assert case.run(tensors, experts, compiled=True).equal(case.run(tensors, experts))


@pytest.mark.parametrize("experts", BOTH)
@pytest.mark.parametrize("name", ["channel", "tensor_static"])
def test_rows_that_were_quantized_before_they_came(experts, name):
    case, batched = CASES[name], experts is CutlassBatchedExpertsFp8
    tensors = LAYER.tensors()
    w1, w2, config = case.config(tensors)
    one = experts(LAYER.config(), config, *((5, 1) if batched else ()))
    H, e = LAYER.H, LAYER.E
    x = torch.randn(*((e, 5) if batched else (LAYER.T,)), H).to(BF16)
    q, scale = cutlass_fp8_run._quantized(x.reshape(-1, H), one.per_token, config.a1_scale)
    q, scale = q.view(x.shape), scale.view(*x.shape[:-1], 1)
    counts = ExpertTokensMetadata(torch.tensor([5, 0, 2, 1], dtype=torch.int32))
    shapes = one.workspace_shapes(x.shape[-2], 2 * LAYER.I, H, 2, e, e, None, LAYER.activation)
    weights, ids = tensors["topk_weights"], tensors["topk_ids"]
    outs = []
    whole = [] if one.per_token else [(q, config.a1_scale)]
    for rows, given in ((x, None), (q, scale), *whole):
        scratch = [torch.empty(shape, dtype=BF16) for shape in shapes]
        one.apply(
            *(scratch[2], rows, w1.data, w2.data, weights, ids, LAYER.activation, e, None),
            *(given, None, scratch[0], scratch[1], counts if batched else None, False),
        )
        outs.append(scratch[2])
    live = torch.arange(5) < counts.expert_num_tokens[:, None] if batched else slice(None)
    assert all(torch.equal(out[live], outs[0][live]) for out in outs)
    assert outs[0][live].isfinite().all()
    with pytest.raises(ValueError, match=r"have one scale each or one in all, got 3"):
        one.apply(
            *(scratch[2], q, w1.data, w2.data, weights, ids, LAYER.activation, e, None),
            *(torch.ones(3), None, *scratch[:2], counts if batched else None, False),
        )


def test_scales_of_weights_become_rows():
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = cutlass_fp8_run.row_scales
    assert rows(scale, 2, 4).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert rows(scale, 2, 4, interleaved=True).tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]
    assert rows(scale[:, :1], 2, 3).tolist() == [[1] * 3, [3] * 3]
    assert rows(scale[:, :, None].repeat(1, 2, 1), 2, 4).tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]
    for wrong in (scale, scale[:1], scale[:, :, None]):
        with pytest.raises(ValueError, match=r"are \[2, 3, 1\] or \[2, shards\], got"):
            rows(wrong, 2, 3)


def test_what_is_missing_is_named():
    one = CutlassExpertsFp8(LAYER.config(), FusedMoEQuantConfig())
    with pytest.raises(ValueError, match="w1 and w2 need scales, found none"):
        one.scales(torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), LAYER.activation)
    batched = CutlassBatchedExpertsFp8(LAYER.config(), FusedMoEQuantConfig(), 4, 1)
    rows = torch.zeros(4, 4, 64)
    with pytest.raises(ValueError, match=r"expert_num_tokens \[4\], got None"):
        batched.apply(
            rows, rows, rows, rows, None, None, LAYER.activation, 4, None, None, None, rows, rows,
            None, False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "^cutlass_fp8$"),
        ({"I": 40}, "multiple of 16 bytes, intermediate_size_per_partition is 40"),
        ({"capability": (8, 9)}, r"needs compute capability \(9, 0\)"),
        ({"capability": (10, 0)}, "row scales on capability 9, not 10"),
        ({"rows": FP8_DYNAMIC_128}, "does not run weights"),
        ({"bias": True}, "expert biases"),
        ({"dtype": torch.float16}, "torch.float16"),
    ],
)
def test_selection_says_why_not(monkeypatch, changes, reason):
    changes = {"capability": (9, 0), "rows": FP8_DYNAMIC_TOKEN} | changes
    capability, rows = changes.pop("capability"), changes.pop("rows")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    moe = replace(LAYER, device="cuda", **changes).config()
    moe = replace(moe, options=MoEOptions(experts="cutlass_fp8"))
    try:
        found = select(moe, format_named("fp8_channel").key, rows).chosen.name
    except ValueError as error:
        found = str(error)
    assert re.search(reason, found), found


def test_a_torch_without_the_function_is_a_reason(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "scaled_grouped_mm")
    moe = replace(LAYER, device="cuda").config()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    moe = replace(moe, options=MoEOptions(experts="cutlass_fp8"))
    with pytest.raises(ValueError, match=r"needs torch\.nn\.functional\.scaled_grouped_mm; torch"):
        select(moe, format_named("fp8_channel").key, FP8_DYNAMIC_TOKEN)


def test_what_lies_in_unused_rows_does_not_count_for_a_common_scale():
    case = CASES["dynamic_map"]
    tensors, layer = case.layer.tensors(), case.layer
    w1, w2, config = case.config(tensors)
    one = CutlassExpertsFp8(layer.config(), config)
    sizes = (layer.T, 2 * layer.I, layer.H, layer.K, layer.E, layer.local)
    shapes = one.workspace_shapes(*sizes, None, layer.activation)
    scratch = [torch.full(shape, 3e4, dtype=BF16) for shape in shapes]
    x, weights, ids = (tensors[n] for n in ("hidden_states", "topk_weights", "topk_ids"))
    one.apply(
        *(scratch[2], x, w1.data, w2.data, weights, ids, layer.activation, layer.E),
        *(tensors["expert_map"], None, None, scratch[0], scratch[1], None, False),
    )
    assert_rounded(scratch[2], case, tensors)
