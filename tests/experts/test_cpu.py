"""The CPU experts: right on every path their products take, bounded scratch, clear errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedmoe.experts.functional  # noqa: F401  it makes the operator
from fusedmoe import ApplyMoEActivationConfig, FusedMoE, MoEOptions, explain
from fusedmoe.experts import cpu_gemm
from fusedmoe.experts.cpu import CpuExperts, CpuMonolithicExperts
from fusedmoe.experts.cpu_core import cpu_fused_experts
from fusedmoe.experts.cpu_gemm import linear_for, slices_of
from fusedmoe.experts.cpu_packed import CpuPackedExperts
from fusedmoe.experts.cpu_plan import MAX_ROWS, ExpertRows, Route, blocks_of, sort_slots
from fusedmoe.experts.cpu_run import SCRATCH_BYTES, scratch_rows
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.modular_kernel import FusedMoEKernel
from fusedmoe.selection import select
from fusedmoe.testing import Case, assert_close, check_experts, make_inputs, nan_poison

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BF16_CPU = cpu_gemm.has_native(torch.bfloat16)


def run(case: Case, dtype=torch.float32, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """``cpu_fused_experts`` and the definition (fp64) on a case's tensors."""
    inputs = make_inputs(case, dtype=dtype)
    tensors = (inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, inputs.topk_ids)
    with nan_poison():
        found = cpu_fused_experts(
            *tensors,
            activation=case.activation,
            activation_config=case.numbers,
            expert_map=inputs.expert_map,
            apply_router_weight_on_input=case.weight_on_input,
            **arguments,
        )
    expected = experts_reference(
        *(t.double() if t.is_floating_point() else t for t in tensors),
        activation=case.activation,
        activation_config=case.numbers,
        expert_map=inputs.expert_map,
        apply_router_weight_on_input=case.weight_on_input,
        compute_dtype=torch.float64,
    )
    return found, expected


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("experts", [CpuExperts, CpuMonolithicExperts])
def test_as_an_implementation(experts):
    results = check_experts(experts)
    skipped = {str(result.case) for result in results if result.skipped}
    fixed_ids = {"dropped-slots", "all-dropped", "expert-map-dropped", "weight-on-input"}
    assert skipped == (fixed_ids if experts is CpuMonolithicExperts else set())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 31, 33, 300])
@pytest.mark.parametrize("shape", [(96, 40), (1, 7), (97, 33), (2048, 24), (64, 1100)])
def test_every_product_for_every_number_of_rows(rows, shape, dtype):
    N, K = shape
    x, weight = torch.randn(rows, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    exact = x.double() @ weight.double().T
    for layout in (weight, weight.T.contiguous().T):
        out = torch.full((rows, N), float("nan"), dtype=dtype)
        linear_for(dtype)(x, layout, out)
        assert_close(f"{rows} rows of {shape}", out, exact, factor=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 9])
def test_a_cpu_without_instructions_for_the_dtype(rows, dtype, monkeypatch):
    monkeypatch.setattr(cpu_gemm, "has_native", lambda of: of is torch.float32)
    monkeypatch.setattr(cpu_gemm, "_has_onednn", lambda: False)
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(64, 48).to(dtype)
    out = torch.empty(rows, 64, dtype=dtype)
    linear_for(dtype)(x, weight, out)
    assert_close("emulated", out, x.double() @ weight.double().T)


def test_slices_are_equal_and_not_too_thin():
    assert (slices_of(2048), slices_of(128), slices_of(64), slices_of(97)) == (8, 4, 2, 1)
    assert all(n % slices_of(n) == 0 for n in range(1, 300))


@given(
    T=st.integers(0, 40),
    E=st.integers(1, 12),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    routing=st.sampled_from(["uniform", "balanced", "power_law_1.2", "one_expert"]),
    dropped=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_any_sizes(T, E, data, dtype, routing, dropped):
    case = Case(
        T=T,
        E=E,
        K=data.draw(st.integers(1, E)),
        H=data.draw(st.integers(8, 70)),
        I=data.draw(st.integers(8, 70)),
        local=data.draw(st.sampled_from([None, max(1, E // 2)])),
        routing=routing,
        dropped=dropped,
        transposed=data.draw(st.booleans()),
    )
    found, expected = run(case, dtype)
    # Few terms: single roundings weigh more than in a layer of real size.
    assert_close(str(case), found, expected, factor=5)


@given(st.lists(st.integers(0, 700), max_size=20), st.integers(1, 300))
@settings(deadline=None)
def test_blocks_cover_the_rows_once_and_in_order(counts, block_rows):
    given_counts = [ExpertRows(e, n) for e, n in enumerate(counts) if n]
    blocks = list(blocks_of(given_counts, block_rows))
    seen = [pair for block in blocks for pair in block.experts]
    assert [b.start for b in blocks] == [0, *[b.stop for b in blocks]][: len(blocks)]
    assert all(b.stop - b.start == sum(e.rows for e in b.experts) for b in blocks)
    assert seen == given_counts
    assert all(len(b.experts) == 1 or b.stop - b.start <= block_rows for b in blocks)


def test_an_expert_with_very_many_rows_is_cut():
    blocks = list(
        blocks_of([ExpertRows(0, 3), ExpertRows(5, 2 * MAX_ROWS + 7), ExpertRows(6, 1)], 256)
    )
    assert [b.stop - b.start for b in blocks] == [3, MAX_ROWS, MAX_ROWS, 8]
    assert blocks[-1].experts == [ExpertRows(5, 7), ExpertRows(6, 1)]


@pytest.mark.parametrize("before", [1, MAX_ROWS, MAX_ROWS + 3])
def test_an_expert_that_is_cut_leaves_those_before_it_a_block(before):
    """Narrow experts have blocks of more rows than an expert is cut into."""
    counts = [ExpertRows(0, before), ExpertRows(1, MAX_ROWS + 1), ExpertRows(2, 5)]
    blocks = list(blocks_of(counts, 8 * MAX_ROWS))
    assert [b.start for b in blocks] == [0, *[b.stop for b in blocks]][: len(blocks)]
    assert all(b.stop - b.start == sum(e.rows for e in b.experts) for b in blocks)
    assert blocks[-1].experts == [ExpertRows(1, 1), ExpertRows(2, 5)]


def test_a_long_prompt_of_narrow_experts():
    found, expected = run(Case(T=2 * MAX_ROWS, K=3, E=4, H=16, I=16))
    assert_close("long prompt", found, expected)


def test_slots_are_sorted_by_expert_and_by_token_within():
    order = sort_slots([[3, 0], [-1, 3], [0, 9]], Route.make(4, num_global=10))
    assert order.counts == [ExpertRows(0, 2), ExpertRows(3, 2)]
    assert order.tokens == [0, 2, 0, 1]
    assert order.slots == [0, 1, 3, 4]  # of -1, and of 9, which is not here, nothing is left
    assert [order.tokens[row] for row in order.rows] == [0, 0, 1, 2]
    assert order.offsets == [0, 2, 3]


@pytest.mark.parametrize("T", [1, 5])
def test_an_id_out_of_range_is_named(T):
    inputs = make_inputs(Case(T=T, E=4))
    tensors = [inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights]
    for bad in (4, -2, 2**31 - 1):
        ids = inputs.topk_ids.clone()
        ids[-1, 1] = bad
        with pytest.raises(ValueError, match=rf"topk_ids contain {bad},.* 4 experts"):
            cpu_fused_experts(*tensors, ids)
    ids = torch.full_like(inputs.topk_ids, 5)
    expert_map = torch.tensor([0, 1, 2, 3, -1, -1], dtype=torch.int32)
    assert not cpu_fused_experts(*tensors, ids, expert_map=expert_map).any()
    assert not cpu_fused_experts(*tensors, ids, global_num_experts=6).any()
    with pytest.raises(ValueError, match="contain 5"):
        cpu_fused_experts(*tensors, ids, expert_map=expert_map[:5])


def test_shapes_and_dtypes_that_disagree_are_named():
    inputs = make_inputs(Case())
    x, w1, w2 = inputs.hidden_states, inputs.w1, inputs.w2
    route = (inputs.topk_weights, inputs.topk_ids)
    for tensors, message in (
        ((x[0], w1, w2, *route), r"\(64,\)"),
        ((x, w1[:, :-1], w2, *route), r"w1 is \(4, 95, 64\).*\(4, 96, 64\)"),
        ((x, w1[:3], w2, *route), r"\(3, 96, 64\)"),
        ((x[:, :-1], w1, w2, *route), r"\(7, 63\)"),
        ((x.double(), w1.double(), w2.double(), *route), "float64"),
        ((x.bfloat16(), w1, w2, *route), "bfloat16"),
        ((x, w1, w2, route[0][:2], route[1]), r"\(2, 2\)"),
        ((x, w1, w2, route[0], route[1][:2]), r"topk_ids \[T, K\], got \(7, 64\) and \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_fused_experts(*tensors)
    with pytest.raises(ValueError, match=r"w2_bias is \(4, 63\), .* ask for \(4, 64\)"):
        cpu_fused_experts(x, w1, w2, *route, w2_bias=torch.zeros(4, 63))
    with pytest.raises(ValueError, match="K = 2"):
        cpu_fused_experts(x, w1, w2, *route, apply_router_weight_on_input=True)


@pytest.mark.parametrize("rows", [2, 3, 7, 100])
def test_little_scratch_takes_the_tokens_in_parts(rows):
    """Here even with poison in it; other parts mean other products, hence the tolerance."""
    case = Case(T=23, K=2, E=8, dropped=0.2)
    found, expected = run(case, scratch=torch.full((rows, case.H), float("nan")))
    assert_close(f"{rows} rows of scratch", found, expected)


def test_scratch_is_bounded_and_holds_at_least_one_token():
    assert scratch_rows(10, 4, 64) == 40
    assert scratch_rows(10**6, 8, 2048) * 2048 * 4 <= SCRATCH_BYTES
    assert scratch_rows(10, 4, 64, max_bytes=1) == 4
    layer = FusedMoE(8, 2, 64, 48, params_dtype=torch.bfloat16)
    kernel = layer.routed_experts.quant_method.kernel(layer.routed_experts)
    assert isinstance(kernel, FusedMoEKernel)
    assert kernel.peak_workspace_bytes(5) == 5 * 2 * 64 * 4


@pytest.mark.parametrize("experts", ["cpu", "cpu_monolithic"])
def test_the_workspace_limit_of_a_layer_is_kept(experts):
    layers = [
        FusedMoE(
            8,
            2,
            64,
            48,
            params_dtype=torch.float32,
            options=MoEOptions(experts=experts, max_workspace_bytes=limit),
        )
        for limit in (None, 5 * 64 * 4)
    ]
    for parameter in layers[0].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layers[1].load_state_dict(layers[0].state_dict())
    x, logits = torch.randn(9, 64), torch.randn(9, 8)
    assert_close("in parts", layers[1](x, logits), layers[0](x, logits))


def test_a_token_alone_has_the_same_bits_in_every_company():
    case = Case(T=40, K=3, E=5, H=72, I=56)
    inputs = make_inputs(case)
    tensors = (inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)

    def some(part: slice) -> torch.Tensor:
        x, weights, ids = (t[part] for t in tensors)
        return cpu_fused_experts(x, inputs.w1, inputs.w2, weights, ids, batch_invariant=True)

    together = some(slice(None))
    for part in (slice(0, 1), slice(17, 18), slice(5, 31)):
        assert torch.equal(together[part], some(part))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("experts", ["cpu", "cpu_monolithic"])
def test_no_tokens(experts, batch_invariant):
    options = MoEOptions(experts=experts, batch_invariant=batch_invariant)
    layer = FusedMoE(8, 2, 64, 48, torch.float32, options=options)
    assert layer(torch.empty(0, 64), torch.empty(0, 8)).shape == (0, 64)
    inputs = make_inputs(Case(T=0))
    x, ids = inputs.hidden_states, inputs.topk_ids
    given = x, inputs.w1, inputs.w2, inputs.topk_weights, ids
    assert cpu_fused_experts(*given, batch_invariant=batch_invariant).shape == x.shape


def test_no_gradient_and_no_trace_of_one():
    inputs = make_inputs(Case())
    x = inputs.hidden_states.requires_grad_()
    found = cpu_fused_experts(x, inputs.w1, inputs.w2, inputs.topk_weights, inputs.topk_ids)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_one_opaque_operator(dtype):
    inputs = make_inputs(Case(bias=True, local=3), dtype=dtype)
    arguments = (
        inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, inputs.topk_ids,
        [inputs.w1_bias, inputs.w2_bias], "", inputs.expert_map, "silu", False, 4,
        ApplyMoEActivationConfig().numbers(), False, None, "cpu", False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fusedmoe.fused_experts, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors):
        return cpu_fused_experts(*tensors) * 1

    tensors = arguments[:5]
    for T in (7, 1, 4):
        part = (tensors[0][:T], *tensors[1:3], tensors[3][:T], tensors[4][:T].clamp(max=2))
        assert torch.equal(compiled(*part), cpu_fused_experts(*part))


@pytest.mark.parametrize("experts", ["cpu", "cpu_monolithic", "cpu_packed"])
def test_a_whole_layer_compiles(experts):
    if experts == "cpu_packed" and not BF16_CPU:
        pytest.skip("this CPU has no bf16 instructions")
    layer = FusedMoE(8, 2, 64, 48, params_dtype=torch.bfloat16, options=MoEOptions(experts=experts))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.routed_experts.process_weights_after_loading()
    x, logits = torch.randn(5, 64).bfloat16(), torch.randn(5, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close("compiled", compiled(x, logits), layer(x, logits))


def test_selection_on_a_cpu():
    moe = Case().moe_config("cpu", torch.float32)
    assert select(moe).chosen is CpuExperts
    assert select(replace(moe, options=MoEOptions(batch_invariant=True))).chosen is CpuExperts
    text = str(explain(moe))
    assert "not cpu_packed: does not compute in torch.float32" in text
    assert "not cpu_monolithic: it can" in text
    gpu = replace(moe, device=torch.device("cuda"), options=MoEOptions(experts="cpu"))
    with pytest.raises(ValueError, match="cpu: runs on cpu, not cuda"):
        select(gpu)
    bf16 = Case().moe_config("cpu", torch.bfloat16)
    assert select(bf16).chosen is (CpuPackedExperts if BF16_CPU else CpuExperts)


def test_the_monolithic_one_asks_the_layers_router_once(monkeypatch):
    layer = FusedMoE(8, 2, 64, 48, options=MoEOptions(experts="cpu_monolithic"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    asked, route = [], layer.router.route

    def recording(hidden_states, router_logits, *args, **kwargs):
        asked.append((hidden_states.shape, kwargs["input_ids"]))
        return route(hidden_states, router_logits, *args, **kwargs)

    monkeypatch.setattr(layer.router, "route", recording)
    input_ids = torch.arange(5)
    layer(torch.randn(5, 64), torch.randn(5, 8), input_ids)
    assert len(asked) == 1
    assert torch.equal(asked[0][1], input_ids)
