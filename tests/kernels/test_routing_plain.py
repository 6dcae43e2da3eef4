"""The host's short cut for the commonest rule: the definition's bits, or no answer."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.kernels.routing import routing, routing_reference
from fusedmoe.kernels.routing_plain import is_plain, plain_routing
from fusedmoe.router.spec import RoutingSpec, RoutingTensors

NO_TENSORS = RoutingTensors()


def plain(logits: torch.Tensor, spec: RoutingSpec, **tensors: torch.Tensor):
    return plain_routing(logits, spec, RoutingTensors(**tensors), None, torch.int32)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("T", "E", "K"), [(1, 8, 2), (17, 64, 8), (5, 128, 8), (4, 6, 6), (0, 8, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_bits_of_the_definition(score, renormalize, T, E, K, dtype):
    logits = (
        torch.stack([torch.randperm(E) for _ in range(T)]).to(dtype) if T else torch.zeros(0, E)
    )
    logits = (logits * 0.11 - 3).to(dtype)
    spec = RoutingSpec(
        top_k=K,
        num_experts=E,
        score_function=score,
        renormalize=renormalize,
        routed_scaling_factor=1.5,
    )
    expected = routing_reference(logits, spec, NO_TENSORS)
    found = plain(logits, spec)
    if found is None:  # scores may tie in bf16
        assert dtype is torch.bfloat16
        return
    assert torch.equal(found.topk_weights, expected.topk_weights)
    assert torch.equal(found.topk_ids, expected.topk_ids)
    assert found.topk_ids.dtype is torch.int32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_what_it_cannot_tell_comes_from_the_definition(bad, score):
    logits = torch.randn(4, 8)
    logits[1, 3] = bad
    logits[2, :] = 1.0
    spec = RoutingSpec(top_k=2, num_experts=8, score_function=score, renormalize=True)
    found, expected = routing(logits, spec, NO_TENSORS), routing_reference(logits, spec, NO_TENSORS)
    assert torch.equal(found.topk_weights, expected.topk_weights)
    assert torch.equal(found.topk_ids, expected.topk_ids)


def test_ties_among_the_chosen_and_at_the_border_are_left_alone():
    spec = RoutingSpec(top_k=2, num_experts=4)
    assert plain(torch.tensor([[3.0, 3.0, 1.0, 0.0]]), spec) is None
    assert plain(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), spec) is None
    assert plain(torch.tensor([[3.0, 2.0, 1.0, 1.0]]), spec) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_expert_group": 2, "topk_group": 1},
        {"score_after_topk": True},
        {"score_function": "sqrtsoftplus"},
        {"selection": "sparsemixer"},
        {"num_zero_experts": 2},
        {"num_fused_shared_experts": 1},
        {"logit_softcap": 30.0},
        {"renormalize": True, "renormalize_epsilon": 1e-20},
    ],
)
def test_other_rules_are_not_plain(changes):
    assert not is_plain(RoutingSpec(**{"top_k": 2, "num_experts": 8} | changes))


def test_a_bias_is_not_ignored():
    spec = RoutingSpec(top_k=2, num_experts=8, score_function="sigmoid")
    assert plain(torch.randn(3, 8), spec, correction_bias=torch.zeros(8)) is None
