"""Cases, their tensors, and the routings that tests and benchmarks share."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.testing import (
    ACTIVATION_CASES,
    ROUTINGS,
    STANDARD_CASES,
    Case,
    make_inputs,
    routing_logits,
)


def loads(routing: str, T: int, E: int, K: int) -> torch.Tensor:
    ids = routing_logits(routing, T, E, K, seed=3).topk(K).indices
    return torch.bincount(ids.flatten(), minlength=E)


def test_balanced_gives_every_expert_its_share_give_or_take_one():
    for T, E, K in ((64, 16, 2), (37, 8, 3), (1, 128, 8)):
        counts = loads("balanced", T, E, K)
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == T * K


def test_one_expert_gets_a_slot_of_every_token():
    counts = loads("one_expert", 50, 16, 3)
    assert counts.sort(descending=True).values[:4].tolist() == [50, 50, 50, 0]


def test_uniform_is_even_and_power_law_is_not():
    T, E = 20000, 16
    even = loads("uniform", T, E, 1) / T
    assert (even - 1 / E).abs().max() < 0.01
    skewed = (loads("power_law_1.2", T, E, 1) / T).sort(descending=True).values
    law = torch.arange(1, E + 1) ** -1.2
    assert (skewed - law / law.sum()).abs().max() < 0.02


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_are_reproducible_and_have_no_ties(routing):
    logits = routing_logits(routing, 9, 32, 4, seed=1)
    assert logits.shape == (9, 32)
    assert logits.dtype is torch.float32
    assert torch.equal(logits, routing_logits(routing, 9, 32, 4, seed=1))
    assert not torch.equal(logits, routing_logits(routing, 9, 32, 4, seed=2))
    best = logits.topk(5).values
    assert bool((best[:, :-1] > best[:, 1:]).all())
    assert routing_logits(routing, 0, 32, 4).shape == (0, 32)


def test_bad_routings_are_refused():
    with pytest.raises(ValueError, match=r"'zipf'.*balanced"):
        routing_logits("zipf", 1, 2, 1)
    with pytest.raises(ValueError, match=r"K 3.*E 2"):
        routing_logits("uniform", 1, 2, 3)


def test_ids_of_cases_are_unique_and_readable():
    names = [str(case) for case in (*STANDARD_CASES, *ACTIVATION_CASES)]
    assert len(set(names)) == len(names)
    assert str(Case(T=3, bias=True, local=2, routing="balanced")) == (
        "T3-K2-E4-H64-I48-bias-local2-balanced"
    )
    assert str(Case(activation=MoEActivation.GELU, dropped=0.5)).endswith("-gelu-dropped0.5")


def test_the_standard_cases_cover_what_breaks_things():
    assert {case.activation for case in ACTIVATION_CASES} == set(MoEActivation) - {
        MoEActivation.RELU2
    }
    for present in (
        lambda c: c.T == 0,
        lambda c: c.K == c.E,
        lambda c: c.routing == "one_expert",
        lambda c: c.dropped > 0,
        lambda c: c.local is not None and c.bias,
        lambda c: c.transposed,
        lambda c: c.strided,
        lambda c: c.weight_on_input,
    ):
        assert any(present(case) for case in STANDARD_CASES)


@pytest.mark.parametrize("case", STANDARD_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_have_the_shapes_the_contract_names(case, dtype):
    inputs = make_inputs(case, dtype=dtype)
    e = case.E if case.local is None else case.local
    assert inputs.hidden_states.shape == (case.T, case.H)
    assert inputs.w1.shape == (e, case.w13_shards * case.I, case.H)
    assert inputs.w2.shape == (e, case.H, case.I)
    assert inputs.topk_ids.shape == inputs.topk_weights.shape == (case.T, case.K)
    assert inputs.topk_ids.dtype is case.ids_dtype
    assert inputs.topk_weights.dtype is torch.float32
    assert bool((inputs.topk_weights[inputs.topk_ids < 0] == 0).all())
    assert inputs.w1.is_contiguous() != case.transposed
    for rows in (inputs.hidden_states, inputs.topk_weights, inputs.topk_ids):
        assert rows.is_contiguous() != case.strided
    if case.T > 1 and case.routing == "uniform":
        assert bool((inputs.topk_weights < 1).all()), "a weight of one would not show"
    if case.local is not None:
        assert sorted(inputs.expert_map[inputs.expert_map >= 0].tolist()) == list(range(e))
    again = make_inputs(case, dtype=dtype)
    assert all(
        a is None or torch.equal(a, b)
        for a, b in zip(vars(inputs).values(), vars(again).values(), strict=True)
    )
