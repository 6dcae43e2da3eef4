"""Two halves of a forward take turns on the wire, and nothing else changes."""

from __future__ import annotations

import pytest
import rank_micro_batches
from rank_layers import Layout


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mover", ["naive_dp_ep", "all_to_all"])
def test_halves_give_the_bits_of_the_whole(ranks, mover, given):
    ranks.run(rank_micro_batches.check_halves, Layout(dp=4, ep=True), mover, given)


@pytest.mark.parametrize(
    "layout", [Layout(dp=2, tp=2, ep=True, sp=True), Layout(dp=2, pcp=2, ep=True)], ids=str
)
def test_over_two_dimensions(ranks, layout):
    ranks.run(rank_micro_batches.check_halves, layout, "naive_dp_ep", False)


def test_the_room_is_that_of_the_whole_forward(ranks):
    ranks.run(rank_micro_batches.check_room)


@pytest.mark.parametrize("mover", ["naive_dp_ep", "all_to_all"])
def test_with_adapters_there_is_one_forward_at_a_time(ranks, mover):
    ranks.run(rank_micro_batches.check_adapters_keep_it_whole, mover)


def test_ranks_that_split_differently_are_found(ranks):
    ranks.run(rank_micro_batches.check_disagreement)
