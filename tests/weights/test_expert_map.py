"""Placement of experts over ranks: every expert on exactly one rank, and tables that agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedmoe.weights.expert_map import (
    ExpertMapManager,
    determine_expert_counts,
    determine_expert_map,
    experts_of_rank,
    make_routing_tables,
)

PLACEMENTS = st.sampled_from(["linear", "round_robin"])


@given(st.integers(1, 9), st.integers(1, 40), PLACEMENTS)
def test_every_expert_lives_on_exactly_one_rank(ep_size, num_experts, strategy):
    maps = [determine_expert_map(ep_size, r, num_experts, strategy) for r in range(ep_size)]
    assert sum(m.num_local_experts for m in maps) == num_experts
    if ep_size == 1:
        assert maps[0].expert_map is None
        return
    stacked = torch.stack([m.expert_map for m in maps])
    assert stacked.dtype is torch.int32
    assert ((stacked >= 0).sum(0) == 1).all()
    for m in maps:
        local = m.expert_map[m.expert_map >= 0]
        assert local.tolist() == list(range(m.num_local_experts))


def test_linear_gives_the_first_ranks_one_more():
    assert [experts_of_rank(3, r, 8) for r in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert determine_expert_map(3, 2, 8).expert_map.tolist() == [-1] * 6 + [0, 1]


def test_round_robin_deals_them_out():
    assert [experts_of_rank(3, r, 8, "round_robin") for r in range(3)] == [
        [0, 3, 6],
        [1, 4, 7],
        [2, 5],
    ]


def test_more_ranks_than_experts_leaves_some_empty():
    assert determine_expert_map(3, 2, 2).num_local_experts == 0
    assert determine_expert_map(3, 2, 2).expert_map.tolist() == [-1, -1]


def test_fused_shared_experts_follow_the_local_ones_on_every_rank():
    found = determine_expert_map(2, 1, 5, num_fused_shared_experts=2, return_expert_mask=True)
    assert found.num_local_experts == 2
    assert found.expert_map.tolist() == [-1, -1, -1, 0, 1, 2, 3]
    assert found.expert_mask.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]


@given(st.integers(1, 7), st.integers(1, 30), PLACEMENTS)
def test_routing_tables_are_inverse_and_number_rows_rank_by_rank(ep_size, num_experts, strategy):
    first = 0
    for rank in range(ep_size):
        tables = make_routing_tables(ep_size, rank, num_experts, strategy)
        back = tables.physical_to_global[tables.global_to_physical.long()]
        assert back.tolist() == list(range(num_experts))
        count = len(tables.local_to_global)
        rows = tables.physical_to_global[first : first + count]
        assert rows.tolist() == tables.local_to_global.tolist()
        first += count


def test_manager_answers_for_ids():
    manager = ExpertMapManager(8, num_redundant_experts=2, ep_size=2, ep_rank=1)
    assert manager.num_local_experts == 4
    assert [manager.local_row(e) for e in range(8)] == [-1, -1, -1, -1, 0, 1, 2, 3]
    assert manager.num_logical_experts == 6
    assert manager.replicas(0) == [0, 6]
    assert manager.replicas(1) == [1, 7]
    assert manager.replicas(2) == [2]
    with pytest.raises(ValueError, match="8 does not lie"):
        manager.local_row(8)
    with pytest.raises(ValueError, match="6 does not lie"):
        manager.replicas(6)


def test_manager_places_anew():
    manager = ExpertMapManager(6)
    assert manager.expert_map is None
    assert manager.routing_tables is None
    manager.update(3, 2)
    assert manager.expert_map.tolist() == [-1, -1, -1, -1, 0, 1]
    assert manager.routing_tables.local_to_global.tolist() == [4, 5]
    manager.update(1, 0)
    assert manager.expert_map is None
    assert manager.local_row(5) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: experts_of_rank(2, 2, 4), "ep_rank 2"),
        (lambda: experts_of_rank(2, 0, 4, "zigzag"), "zigzag"),
        (lambda: ExpertMapManager(4, num_redundant_experts=4), "4 redundant"),
        (lambda: ExpertMapManager(4, 1, 2, 0, "round_robin"), "round_robin"),
        (lambda: determine_expert_counts(0), "num_experts 0"),
        (lambda: determine_expert_counts(4, -1), "-1"),
    ],
)
def test_impossible_placements_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_counts():
    assert determine_expert_counts(8, 2, 1) == (11, 9, 1)
    assert determine_expert_counts(8, 2, 1, fuse_shared_experts=False) == (10, 8, 0)
    assert determine_expert_counts(8) == (8, 8, 0)
