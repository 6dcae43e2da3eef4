"""The planner: every expert has a slot, ranks are even, never worse than DeepSeek's algorithm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmoe.eplb.maps import balancedness, compute_logical_maps, imbalance, rank_loads
from fusedmoe.eplb.placement import experts_of_nodes, pack, replicate
from fusedmoe.eplb.planner import keep_slots, published_placement, rebalance_experts
from fusedmoe.eplb.refine import refine
from fusedmoe.testing.routing import routing_logits

E, K, TOKENS = 256, 8, 8192


def power_law(seed: int, layers: int = 1) -> torch.Tensor:
    """Picks of each expert [layers, E] under power-law routing (exponent 1.2)."""
    rows = []
    for layer in range(layers):
        ids = routing_logits("power_law_1.2", TOKENS, E, K, seed + layer).topk(K).indices
        rows.append(torch.bincount(ids.flatten(), minlength=E))
    return torch.stack(rows)


def published(load: torch.Tensor, P: int, ranks: int, groups: int = 1, nodes: int = 1):
    rows = [
        [e for node in published_placement(one, P, ranks, groups, nodes) for r in node for e in r]
        for one in load.double().tolist()
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("seed", [0, 100, 200])
@pytest.mark.parametrize(
    ("ranks", "redundant", "bound"),
    [(8, 24, 1.05), (16, 16, 1.10), (32, 32, 1.15), (64, 64, 1.15), (128, 128, 1.15)],
)
def test_skewed_load_becomes_even(ranks, redundant, bound, seed):
    """10, 10, 12.5, 25 and 50 % of redundant experts, rounded down to what divides."""
    load = power_law(seed)
    plan = rebalance_experts(load, E + redundant, ranks)
    found = imbalance(rank_loads(load, plan, ranks))
    theirs = imbalance(rank_loads(load, published(load, E + redundant, ranks), ranks))
    assert found <= bound
    assert found <= theirs * (1 + 1e-9)


def test_a_later_sample_of_the_same_load_is_even_too():
    """What is planned on one window serves the next."""
    plan = rebalance_experts(power_law(0), E + 32, 32)
    other = power_law(0)
    generator = torch.Generator().manual_seed(1)
    other = torch.poisson(other.float(), generator=generator)
    assert imbalance(rank_loads(other, plan, 32)) < 1.1


LOADS = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 1e6, allow_subnormal=False)), min_size=12, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(LOADS, st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 3), st.sampled_from([1, 2, 3]))
def test_any_load(values, ranks, extra, nodes):
    """Each expert has a copy, nobody is worse off than with the published placement."""
    nodes = nodes if ranks % nodes == 0 else 1
    load = torch.tensor([values, values[::-1]])
    P = 12 + extra * 12
    plan = rebalance_experts(load, P, ranks, num_groups=6, num_nodes=nodes)
    assert plan.shape == (2, P)
    maps = compute_logical_maps(plan, 12)
    assert int(maps.replica_count.min()) >= 1
    assert maps.replica_count.sum(1).tolist() == [P, P]
    ours = rank_loads(load, plan, ranks).amax(1)
    theirs = rank_loads(load, published(load, P, ranks, 6, nodes), ranks).amax(1)
    assert (ours <= theirs * (1 + 1e-9) + 1e-9).all()
    again = rebalance_experts(load, P, ranks, num_groups=6, num_nodes=nodes, previous=plan)
    even = 1.005 * load.double().sum(1) / ranks
    after = rank_loads(load, again, ranks).amax(1)
    assert (after <= torch.maximum(ours, even) * (1 + 1e-9) + 1e-9).all()


def test_groups_stay_on_one_node():
    load = power_law(3)
    plan = rebalance_experts(load, 288, 8, num_groups=8, num_nodes=4).view(4, -1)
    for group in range(8):
        members = (plan // 32 == group).any(dim=1)
        assert int(members.sum()) == 1
    alike = rebalance_experts(load, 288, 8, num_groups=2, num_nodes=4)  # too few groups for nodes
    assert imbalance(rank_loads(load, alike, 8)) < 1.05
    again = rebalance_experts(load, 288, 8, num_groups=2, num_nodes=4, previous=alike)
    assert torch.equal(again, rebalance_experts(load, 288, 8, previous=alike))


def test_an_expert_that_had_no_slot_gets_one():
    """Whatever was placed before: an expert that is nowhere cannot be routed to."""
    plan = rebalance_experts(torch.ones(1, 3), 4, 2, previous=torch.tensor([[0, 1, 0, 1]]))
    assert set(plan[0].tolist()) == {0, 1, 2}


def test_a_known_placement():
    """Two experts, one three times as busy: three slots of four are its copies."""
    assert rebalance_experts(torch.tensor([[3, 1]]), 4, 2)[0].sort().values.tolist() == [0, 0, 0, 1]
    assert replicate([4.0, 2.0, 2.0], 5) == [3, 1, 1]
    assert pack([5.0, 4.0, 3.0, 2.0], 2) == [[0, 3], [1, 2]]
    assert pack([2.0, 3.0, 4.0, 5.0], 2) == [[3, 0], [2, 1]]
    assert pack([1.0, 9.0, 4.0], 3) == [[0], [1], [2]]
    assert experts_of_nodes([1.0, 1.0, 9.0, 1.0], 2, 2) == [[0, 1], [2, 3]]
    assert experts_of_nodes([1.0, 1.0, 9.0, 1.0], 2, 1) == [[0, 1, 2, 3]]


def test_little_moves_when_little_changes():
    load = power_law(0)
    before = rebalance_experts(load, 288, 8)
    assert torch.equal(rebalance_experts(load, 288, 8, previous=before), before)
    nudged = (load.double() * torch.linspace(0.97, 1.03, E)).round()
    after = rebalance_experts(nudged, 288, 8, previous=before)
    fresh = rebalance_experts(nudged, 288, 8)
    moved = int((after != before).sum())
    assert moved < int((fresh != before).sum()) / 4
    assert imbalance(rank_loads(nudged, after, 8)) <= 1.005


def test_nodes_keep_what_they_can():
    """Planned anew for each node, experts that come to the same rank again keep their slots."""
    load = power_law(0)
    sizes = {"num_groups": 8, "num_nodes": 4}
    before = rebalance_experts(load, 288, 8, **sizes)
    same = rebalance_experts(load, 288, 8, previous=before, **sizes)
    assert torch.equal(same, before)
    nudged = (load.double() * torch.linspace(0.97, 1.03, E)).round()
    after = rebalance_experts(nudged, 288, 8, previous=before, **sizes)
    fresh = rebalance_experts(nudged, 288, 8, **sizes)
    assert int((after != before).sum()) < 0.75 * int((fresh != before).sum())
    found, wanted = (rank_loads(nudged, one, 8).sort().values for one in (after, fresh))
    torch.testing.assert_close(found, wanted)


def test_nothing_is_exchanged_where_nothing_helps():
    assert refine([[0], [1]], [3.0, 1.0], steps=1) == [[0], [1]]
    assert refine([[0, 1], [2, 3]], [4.0, 3.0, 2.0, 1.0], even=1.4) == [
        [0, 1],
        [2, 3],
    ]  # is so even
    halves = refine([[0, 1], [2, 3]], [4.0, 3.0, 2.0, 1.0])
    assert sorted(sum((4.0, 3.0, 2.0, 1.0)[e] for e in rank) for rank in halves) == [5.0, 5.0]


def test_what_stays_on_a_rank_keeps_its_slot():
    before = [[0, 1, 2], [3, 4, 5]]
    assert keep_slots(before, [[5, 3, 0], [2, 7, 1]], 2) == [[7, 1, 2], [3, 0, 5]]
    assert keep_slots([[0, 1], [2, 3]], [[1, 1], [0, 3]], 1) == [[1, 1], [0, 3]]


def test_maps_list_the_copies_in_the_order_of_their_slots():
    maps = compute_logical_maps(torch.tensor([[2, 0, 1, 0, 0], [0, 1, 2, 2, 1]]), 3)
    assert maps.replica_count.tolist() == [[3, 1, 1], [1, 2, 2]]
    assert maps.logical_to_physical.tolist() == [
        [[1, 3, 4], [2, -1, -1], [0, -1, -1]],
        [[0, -1, -1], [1, 4, -1], [2, 3, -1]],
    ]


def test_evenness_is_what_the_slowest_rank_costs():
    loads = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert imbalance(loads) == pytest.approx(5 / 4)
    assert balancedness(loads) == pytest.approx(4 / 5)
    assert imbalance(torch.zeros(2, 3)) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), 4, 2), r"must be \[L, E\]"),
        ((torch.ones(1, 3), 2, 2), "2 slots for 3 experts"),
        ((torch.ones(1, 0), 4, 2), r"must be \[L, E\]"),
        ((torch.ones(1, 3), 4, 0), "3 experts over 0 ranks"),
        ((torch.ones(1, 3), 5, 2), "5 slots do not divide by 2"),
        ((torch.full((1, 3), float("nan")), 4, 2), "expert 0 in layer 0 is nan"),
        ((torch.tensor([[2, -1]]), 4, 2), "not negative, that of expert 1 in layer 0 is -1"),
    ],
)
def test_what_cannot_be_planned(arguments, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(*arguments)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"previous must be \[1, 4\], got \(1, 5\)"):
        rebalance_experts(torch.ones(1, 3), 4, 2, previous=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="4 ranks do not divide by 3"):
        rebalance_experts(torch.ones(1, 4), 4, 4, num_nodes=3)
    with pytest.raises(ValueError, match="3 experts do not divide by 2"):
        rebalance_experts(torch.ones(1, 3), 4, 2, num_groups=2)
    with pytest.raises(ValueError, match="expert 1 of layer 0 has no copy among 3 slots"):
        compute_logical_maps(torch.tensor([[0, 2, 2]]), 3)
    with pytest.raises(ValueError, match=r"ids in \[0, 5\]"):
        compute_logical_maps(torch.tensor([[0, 5, 2]]), 3)
    with pytest.raises(ValueError, match="2 slots cannot hold 3 experts"):
        replicate([1.0, 1.0, 1.0], 2)
    with pytest.raises(ValueError, match="3 items do not divide over 2 packs"):
        pack([1.0, 1.0, 1.0], 2)
    with pytest.raises(ValueError, match="3 slots do not divide over 2 ranks"):
        rank_loads(torch.ones(1, 3), torch.tensor([[0, 1, 2]]), 2)
