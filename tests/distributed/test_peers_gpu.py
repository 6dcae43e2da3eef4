"""Dispatch and combine through the memory of the GPUs of one host."""

from __future__ import annotations

import pytest
import rank_peers

pytestmark = pytest.mark.multigpu


@pytest.mark.parametrize("key", rank_peers.KEYS)
def test_rows_arrive_and_sums_come_back(gpu_ranks, key):
    gpu_ranks.run(rank_peers.check_kernels, key)


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize(
    "tokens", [[5, 5, 5, 5], [7, 0, 3, 1], [9, 0, 0, 0], [1, 1, 1, 1], [600, 513, 700, 1]]
)
def test_a_layer_over_ranks_is_the_layer_of_one(gpu_ranks, tokens, sent):
    gpu_ranks.run(rank_peers.check_layer, tokens, sent)


@pytest.mark.parametrize("key", ["as they are", *rank_peers.WEIGHTS])
def test_rows_stand_with_their_experts(gpu_ranks, key):
    gpu_ranks.run(rank_peers.check_batched, key, [33, 0, 5, 1])


@pytest.mark.parametrize("mover", ["peer", "peer_batched"])
@pytest.mark.parametrize("layout", rank_peers.LAYOUTS)
def test_wherever_tokens_are(gpu_ranks, layout, mover):
    gpu_ranks.run(rank_peers.check_layouts, layout, mover)


@pytest.mark.parametrize("tokens", [[5, 5, 5, 5], [70, 0, 33, 1], [600, 513, 700, 1]])
@pytest.mark.parametrize("key", rank_peers.WEIGHTS)
def test_rows_travel_rounded(gpu_ranks, tokens, key):
    gpu_ranks.run(rank_peers.check_rounded_layer, key, tokens)


def test_rows_in_fp8_reach_the_prefill_kernels(gpu_ranks):
    gpu_ranks.run(rank_peers.check_rounded_layer, "fp8 blocks", [600, 513, 700, 1], True)


@pytest.mark.parametrize("tokens", [[5, 5, 5, 5], [600, 513, 700, 1], [2500, 0, 2048, 700]])
@pytest.mark.parametrize("key", ["as they are", "fp8 blocks"])
def test_products_begin_before_all_rows_are_here(gpu_ranks, tokens, key):
    gpu_ranks.run(rank_peers.check_late_rows, key, tokens)


@pytest.mark.parametrize(
    "tokens", [[600, 600, 600, 600], [600, 513, 700, 1], [900, 0, 0, 0], [2048, 0, 3, 700]]
)
@pytest.mark.parametrize("key", ["as they are", "fp8 blocks", "int8"])
def test_rows_of_picks_are_pushed(gpu_ranks, tokens, key):
    gpu_ranks.run(rank_peers.check_pushed_rows, key, tokens)


@pytest.mark.parametrize("tokens", [[5, 5, 5, 5], [70, 0, 33, 1], [600, 513, 700, 1]])
def test_rows_of_picks_where_some_ranks_send_sums(gpu_ranks, tokens):
    gpu_ranks.run(rank_peers.check_pushed_rows, "as they are", tokens, False, True)


@pytest.mark.parametrize("key", ["as they are", "fp8 blocks"])
def test_rows_of_picks_while_others_arrive(gpu_ranks, key):
    gpu_ranks.run(rank_peers.check_pushed_rows, key, [2048, 0, 1900, 700], True)


@pytest.mark.parametrize("timeout_s", [0.5, 4.0])
def test_a_missing_rank_is_named(gpu_ranks, timeout_s):
    gpu_ranks.run(rank_peers.check_missing_rank, timeout_s)


def test_a_model_of_transformers(gpu_ranks):
    gpu_ranks.run(rank_peers.check_model)


def test_ranks_that_disagree_are_told(gpu_ranks):
    gpu_ranks.run(rank_peers.check_disagreement)


def test_memory_made_a_hundred_times_does_not_grow(gpu_ranks):
    gpu_ranks.run(rank_peers.check_no_growth)
