"""The routing function against loops over Python floats, for every rule and for hostile inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import CASES, make_logits, make_rows, make_tensors
from routing_oracle import route_oracle

from fusedmoe.router.functional import _spec_arguments, _tensor_arguments, route
from fusedmoe.router.spec import RoutingSpec, RoutingTensors

NAN = float("nan")


def check(logits, spec, tensors=None, **rows):
    result = route(logits, spec, tensors, **rows)
    weights, ids, zero = route_oracle(logits, spec, tensors, **rows)
    assert result.topk_weights.dtype is torch.float32
    assert result.topk_ids.dtype is torch.int32
    torch.testing.assert_close(result.topk_ids.long(), ids)
    torch.testing.assert_close(result.topk_weights.double(), weights, rtol=2e-6, atol=1e-7)
    if spec.num_zero_experts:
        torch.testing.assert_close(result.zero_expert_weight.double(), zero, rtol=2e-6, atol=1e-7)
    else:
        assert result.zero_expert_weight is None
    return result


@pytest.mark.parametrize("kind", ["random", "ties", "hostile"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rule_is_the_loop(case, kind):
    logits = make_logits(case, 9, kind=kind)
    check(logits, case.spec, make_tensors(case), **make_rows(case, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CASES[:4] + CASES[16:22], ids=lambda case: case.name)
def test_arithmetic_is_fp32_from_any_logits_dtype(case, dtype):
    """bf16 logits are scored in fp32: the same result as widening them first."""
    logits = make_logits(case, 6, seed=1).to(dtype)
    check(logits.float(), case.spec, make_tensors(case))
    for narrow, wide in zip(
        route(logits, case.spec, make_tensors(case)),
        route(logits.float(), case.spec, make_tensors(case)),
        strict=True,
    ):
        assert (narrow is None and wide is None) or torch.equal(narrow, wide)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_tokens(case):
    result = route(make_logits(case, 0), case.spec, make_tensors(case), **make_rows(case, 0))
    slots = case.spec.top_k + case.spec.num_fused_shared_experts
    assert result.topk_weights.shape == result.topk_ids.shape == (0, slots)


def test_ties_go_to_the_lower_id():
    spec = RoutingSpec(top_k=3, num_experts=6)
    ids = route(torch.tensor([[1.0, 2.0, 1.0, 2.0, 2.0, 1.0]]), spec).topk_ids
    assert ids.tolist() == [[1, 3, 4]]
    assert route(torch.zeros(2, 6), spec).topk_ids.tolist() == [[0, 1, 2]] * 2
    signed_zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0, -1.0]])
    identity = RoutingSpec(top_k=3, num_experts=6, score_function="identity")
    assert route(signed_zeros, identity).topk_ids.tolist() == [[0, 1, 2]]


def test_the_weight_is_the_unbiased_score():
    """A bias of a million would cost (score + bias) - bias all its digits."""
    bias = torch.tensor([0.0, 1e6, 0.0, 0.0])
    spec = RoutingSpec(top_k=1, num_experts=4, score_function="sigmoid")
    result = route(torch.full((1, 4), 0.3), spec, RoutingTensors(correction_bias=bias))
    assert result.topk_ids.item() == 1
    torch.testing.assert_close(result.topk_weights, torch.sigmoid(torch.full((1, 1), 0.3)))


def test_a_nan_row_harms_its_own_token_alone():
    logits = torch.randn(5, 12)
    spec = RoutingSpec(top_k=3, num_experts=12, renormalize=True)
    clean = route(logits, spec)
    logits[2, 4], logits[4] = NAN, NAN
    dirty = route(logits, spec)
    for row in (0, 1, 3):
        assert torch.equal(dirty.topk_ids[row], clean.topk_ids[row])
        assert torch.equal(dirty.topk_weights[row], clean.topk_weights[row])
    assert torch.equal(dirty.topk_weights[[2, 4]], torch.zeros(2, 3))
    assert torch.isfinite(dirty.topk_weights).all()


def test_a_nan_bias_excludes_its_expert():
    bias = torch.tensor([NAN, 5.0, float("-inf"), 0.0])
    spec = RoutingSpec(top_k=3, num_experts=4, score_function="sigmoid", renormalize=True)
    result = route(torch.zeros(1, 4), spec, RoutingTensors(correction_bias=bias))
    assert result.topk_ids.tolist() == [[1, 3, -1]]
    assert result.topk_weights.tolist() == [[0.5, 0.5, 0.0]]


def test_a_masked_logit_is_never_weighted():
    """-inf logits, the usual mask, in rules that compare logits: not chosen, even at K = E."""
    logits = torch.tensor([[float("-inf"), -5.0, -6.0]])
    result = route(logits, RoutingSpec(top_k=3, num_experts=3, score_after_topk=True))
    assert result.topk_ids.tolist() == [[1, 2, -1]]
    assert result.topk_weights[0, 2] == 0


def test_padding_rows_are_empty_whatever_they_hold():
    """Shared experts and identity experts included; token ids of padding are not looked up."""
    spec = RoutingSpec(
        top_k=2, num_experts=4, num_zero_experts=2, num_fused_shared_experts=1, renormalize=True
    )
    tensors = RoutingTensors(hash_indices_table=torch.tensor([[0, 5]]))
    result = route(
        torch.tensor([[0.0] * 6, [NAN] * 6]),
        spec,
        tensors,
        input_ids=torch.tensor([0, -77]),
        is_padding=torch.tensor([False, True]),
    )
    assert result.topk_ids.tolist() == [[0, -1, 4], [-1, -1, -1]]
    assert result.topk_weights.tolist() == [[0.5, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert result.zero_expert_weight.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.int32])
def test_ids_come_in_the_dtype_asked_for(dtype):
    spec = RoutingSpec(top_k=2, num_experts=4)
    assert route(torch.randn(3, 4), spec, indices_dtype=dtype).topk_ids.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint32, torch.float32])
def test_ids_need_a_signed_dtype(dtype):
    with pytest.raises(ValueError, match="-1"):
        route(torch.randn(3, 4), RoutingSpec(top_k=2, num_experts=4), indices_dtype=dtype)


def test_strides_of_the_logits_do_not_matter():
    spec = RoutingSpec(top_k=3, num_experts=10)
    logits = torch.randn(4, 10)
    padded = torch.full((4, 30), NAN)
    padded[:, 5:25:2] = logits
    for view in (padded[:, 5:25:2], logits.t().contiguous().t(), logits[:1].expand(4, 10)):
        assert torch.equal(route(view, spec).topk_ids, route(view.contiguous(), spec).topk_ids)


BIASED = RoutingTensors(correction_bias=torch.zeros(4))
HASHED = RoutingTensors(hash_indices_table=torch.zeros(9, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("logits", "tensors", "rows", "message"),
    [
        (torch.randn(3, 5), None, {}, r"\[T, 4\].*\(3, 5\)"),
        (torch.randn(4), None, {}, r"\(4,\)"),
        (torch.ones(3, 4, dtype=torch.int32), None, {}, "int32"),
        (torch.randn(3, 4), RoutingTensors(correction_bias=torch.zeros(5)), {}, r"\(5,\)"),
        (torch.randn(3, 4), RoutingTensors(vision_bias=torch.zeros(2, 2)), {}, r"\(2, 2\)"),
        (torch.randn(3, 4), RoutingTensors(per_expert_scale=torch.ones(3)), {}, r"\(3,\)"),
        (
            torch.randn(3, 4),
            RoutingTensors(correction_bias=torch.zeros(4, dtype=torch.int64)),
            {},
            "int64",
        ),
        (torch.randn(3, 4), HASHED, {}, "input_ids"),
        (torch.randn(3, 4), HASHED, {"input_ids": torch.zeros(2, dtype=torch.int64)}, r"\(2,\)"),
        (torch.randn(3, 4), HASHED, {"input_ids": torch.zeros(3)}, "float32"),
        (torch.randn(3, 4), HASHED, {"input_ids": torch.tensor([0, 9, 0])}, "token 1: input id 9"),
        (torch.randn(3, 4), HASHED, {"input_ids": torch.tensor([0, 0, -1])}, "token 2"),
        (
            torch.randn(1, 4),
            RoutingTensors(hash_indices_table=torch.tensor([[0, 4]])),
            {"input_ids": torch.tensor([0])},
            "experts in",
        ),
        (
            torch.randn(1, 4),
            RoutingTensors(hash_indices_table=torch.zeros(9, 3, dtype=torch.int64)),
            {"input_ids": torch.tensor([0])},
            r"\(9, 3\)",
        ),
        (torch.randn(3, 4), BIASED, {"is_padding": torch.zeros(3)}, "torch.bool"),
        (torch.randn(3, 4), BIASED, {"is_padding": torch.zeros(4, dtype=torch.bool)}, r"\(4,\)"),
        (
            torch.randn(3, 4),
            RoutingTensors(correction_bias=torch.zeros(4, device="meta")),
            {},
            "meta",
        ),
    ],
)
def test_what_does_not_fit_is_named(logits, tensors, rows, message):
    with pytest.raises(ValueError, match=message):
        route(logits, RoutingSpec(top_k=2, num_experts=4), tensors, **rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k 9"),
        ({"top_k": 0}, "top_k 0"),
        ({"num_expert_group": 3, "topk_group": 1}, "8 experts do not divide into 3"),
        ({"num_expert_group": 4, "topk_group": 5}, "topk_group 5"),
        ({"num_expert_group": 4}, "topk_group 0"),
        ({"topk_group": 2}, "topk_group 2 of no groups"),
        ({"routed_scaling_factor": NAN}, "routed_scaling_factor is nan"),
        ({"score_function": "tanh"}, "'tanh'"),
        ({"group_score": "mean"}, "'mean'"),
        ({"selection": "sparsemixer", "top_k": 3}, "top_k 3"),
        ({"selection": "topk_per_group"}, "0 groups"),
        (
            {"selection": "topk_per_group", "num_expert_group": 2, "topk_group": 1},
            "topk_group is 1",
        ),
        ({"num_zero_experts": -1}, "-1"),
        ({"renormalize_norm": 0.0}, "renormalize_norm"),
        ({"logit_softcap": NAN}, "nan"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutingSpec(**{"top_k": 2, "num_experts": 8} | fields)


def test_image_tokens_need_no_row_in_the_hash_table():
    tensors = RoutingTensors(
        hash_indices_table=torch.tensor([[0, 1]]), vision_bias=torch.tensor([0.0, 0.0, 3.0, 2.0])
    )
    spec = RoutingSpec(top_k=2, num_experts=4, image_sentinel_lo=50)
    result = route(torch.zeros(2, 4), spec, tensors, input_ids=torch.tensor([0, 52]))
    assert result.topk_ids.tolist() == [[0, 1], [2, 3]]


def test_sparsemixer_takes_no_bias():
    spec = RoutingSpec(top_k=2, num_experts=4, selection="sparsemixer")
    with pytest.raises(ValueError, match="no bias"):
        route(torch.randn(1, 4), spec, BIASED)


@st.composite
def routing_problem(draw):
    groups = draw(st.sampled_from([0, 1, 2, 4]))
    num_experts = draw(st.integers(1, 6)) * max(groups, 1)
    top_k = draw(st.integers(1, num_experts))
    score_function = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "identity"]))
    spec = RoutingSpec(
        top_k=top_k,
        num_experts=num_experts,
        score_function=score_function,
        score_after_topk=draw(st.booleans()),
        renormalize=draw(st.booleans()) and score_function != "identity",
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        num_expert_group=groups,
        topk_group=draw(st.integers(1, groups)) if groups else 0,
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
        num_fused_shared_experts=draw(st.integers(0, 2)),
    )
    values = st.sampled_from([-30.0, -2.0, -0.5, 0.0, 0.5, 2.0, 25.0, NAN, float("-inf")])
    row = st.lists(values, min_size=num_experts, max_size=num_experts)
    logits = torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))
    # Multiples of 1/64 in [-2, 2): sums with the scores above never come within an ulp.
    bias = st.lists(st.integers(-128, 127), min_size=num_experts, max_size=num_experts)
    tensors = RoutingTensors(
        correction_bias=torch.tensor(draw(bias)) / 64.0 if draw(st.booleans()) else None
    )
    return logits, spec, tensors


@settings(max_examples=200, deadline=None)
@given(routing_problem())
def test_any_rule_on_any_logits(problem):
    """What must hold whatever the rule: slots, ids, weights, and the loop's answer."""
    logits, spec, tensors = problem
    weights, ids, _ = check(logits, spec, tensors)
    assert torch.isfinite(weights).all()
    assert (weights[ids < 0] == 0).all()
    routed = ids[:, : spec.top_k]
    for row in routed.tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(set(chosen)) == len(chosen)
        assert row[: len(chosen)] == chosen, "empty slots come last"
    if spec.renormalize:
        total = weights[:, : spec.top_k].sum(dim=1) / spec.routed_scaling_factor
        assert (((total - 1).abs() < 1e-5) | (total == 0)).all()


def test_compiled_fullgraph_it_is_the_same():
    spec = RoutingSpec(top_k=3, num_experts=8, num_zero_experts=2, routed_scaling_factor=2)
    bias = torch.nn.Parameter(torch.randn(10))

    def call(logits):
        return route(logits, spec, RoutingTensors(correction_bias=bias))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (3, 5):
        logits = torch.randn(num_tokens, 10)
        for ours, theirs in zip(compiled(logits), call(logits), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat", "vision_hash", "shared"])
def test_the_operator_keeps_its_contract(name):
    case = next(case for case in CASES if case.name == name)
    rows = make_rows(case, 4)
    torch.library.opcheck(
        torch.ops.fusedmoe.route,
        (
            make_logits(case, 4),
            *_tensor_arguments(make_tensors(case)),
            rows["input_ids"],
            rows["is_padding"],
            torch.int32,
            *_spec_arguments(case.spec),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )
