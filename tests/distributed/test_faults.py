"""Ranks that disagree, and batches that do not fit, are errors on every rank, not hangs."""

from __future__ import annotations

import pytest
import rank_faults


def test_layers_that_differ_are_found_when_they_are_built(ranks):
    ranks.run(rank_faults.check_disagreement)


def test_a_rank_that_fails_is_not_waited_for(ranks):
    ranks.run(rank_faults.check_failures)


def test_a_rank_stands_in_one_place(ranks):
    ranks.run(rank_faults.check_overlapping_groups)


def test_memory_is_not_shared_between_hosts(ranks):
    ranks.run(rank_faults.check_peers_of_two_hosts)


def test_memory_that_one_rank_cannot_make(ranks):
    ranks.run(rank_faults.check_memory_of_one_rank)


def test_memory_is_closed_without_a_rank_that_was_missed(ranks):
    ranks.run(rank_faults.check_closing_without_a_rank)


@pytest.mark.parametrize("mover", ["naive_dp_ep", "all_to_all"])
def test_more_tokens_than_there_is_room_for(ranks, mover):
    ranks.run(rank_faults.check_too_many_tokens, mover)


def test_counts_that_cannot_be(ranks):
    ranks.run(rank_faults.check_wrong_counts)


@pytest.mark.parametrize("mover", ["naive_dp_ep", "all_to_all"])
def test_ranks_that_were_given_different_counts(ranks, mover):
    ranks.run(rank_faults.check_counts_that_differ, mover)


def test_ranks_whose_shared_tokens_differ(ranks):
    ranks.run(rank_faults.check_shared_tokens_that_differ)


@pytest.mark.parametrize("mover", ["naive_dp_ep", "all_to_all"])
def test_experts_that_fail(ranks, mover):
    ranks.run(rank_faults.check_failing_experts, mover)


def test_collectives(ranks):
    ranks.run(rank_faults.check_collectives)


def test_packed_rows_come_back_as_they_were():
    rank_faults.check_packing()
