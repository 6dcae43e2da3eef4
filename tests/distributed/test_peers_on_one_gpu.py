"""Peer memory where four ranks take turns on one GPU: the same launches, without the wire."""

from __future__ import annotations

import pytest
import rank_peers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("key", rank_peers.KEYS)
def test_rows_arrive_and_sums_come_back(ranks_on_one_gpu, key):
    ranks_on_one_gpu.run(rank_peers.check_kernels, key)


@pytest.mark.parametrize("sent", [False, True])
def test_a_layer_over_ranks_is_the_layer_of_one(ranks_on_one_gpu, sent):
    ranks_on_one_gpu.run(rank_peers.check_layer, [600, 0, 700, 1], sent)


@pytest.mark.parametrize("key", ["as they are", "int8"])
def test_rows_stand_with_their_experts(ranks_on_one_gpu, key):
    ranks_on_one_gpu.run(rank_peers.check_batched, key, [33, 0, 5, 1])


@pytest.mark.parametrize("layout", ["sp", "dp_tp"])
def test_wherever_tokens_are(ranks_on_one_gpu, layout):
    ranks_on_one_gpu.run(rank_peers.check_layouts, layout)


@pytest.mark.parametrize(
    ("key", "on_hopper"), [*((key, False) for key in rank_peers.WEIGHTS), ("fp8 blocks", True)]
)
def test_rows_travel_rounded(ranks_on_one_gpu, key, on_hopper):
    ranks_on_one_gpu.run(rank_peers.check_rounded_layer, key, [600, 513, 700, 1], on_hopper)


def test_ranks_that_disagree_are_told(ranks_on_one_gpu):
    ranks_on_one_gpu.run(rank_peers.check_disagreement)
