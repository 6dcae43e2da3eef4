"""Dispatch and combine by themselves: which rows arrive, with what, and what comes back."""

from __future__ import annotations

import pytest
import rank_movers
import torch

from fusedmoe import FusedMoEQuantConfig
from fusedmoe.prepare_finalize.naive_dp_ep import MoEPrepareAndFinalizeNaiveDPEPModular
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

MOVERS = list(rank_movers.MOVERS)


@pytest.mark.parametrize("mover", MOVERS)
def test_rows_arrive_with_what_belongs_to_them(ranks, mover):
    ranks.run(rank_movers.check_rows, mover)


@pytest.mark.parametrize("mover", MOVERS)
def test_two_batches_on_their_way_at_once(ranks, mover):
    ranks.run(rank_movers.check_two_batches, mover)


@pytest.mark.parametrize("mover", MOVERS)
def test_the_router_weight_on_the_input_is_applied_before_sending(ranks, mover):
    ranks.run(rank_movers.check_weight_on_input, mover)


def test_logits_travel_where_experts_route(ranks):
    ranks.run(rank_movers.check_monolithic)


@pytest.mark.parametrize("mover", MOVERS)
def test_rows_are_quantized_before_they_are_sent(ranks, mover):
    ranks.run(rank_movers.check_quantized_before_sending, mover)


def test_what_cannot_be_sent_is_refused(ranks):
    ranks.run(rank_movers.check_refusals)


def test_one_rank_needs_no_group():
    """The names and defaults of the API reference, without any process group."""
    mover = MoEPrepareAndFinalizeNaiveDPEPModular(is_sequence_parallel=False, num_dispatchers=1)
    assert mover.num_dispatchers() == 1
    assert mover.topk_indices_dtype() is mover.max_num_tokens_per_rank() is None
    assert not mover.output_is_reduced()
    x, weights = torch.randn(3, 4), torch.rand(3, 2)
    ids = torch.tensor([[0, 1], [1, -1], [2, 0]])
    found = mover.prepare(x, weights, ids, 3, None, False, FusedMoEQuantConfig())
    assert torch.equal(found.hidden_states, x)
    output = torch.full_like(x, float("nan"))
    rows = x[:, None].expand(-1, 2, -1).contiguous()
    mover.finalize(output, rows, weights, ids, False, TopKWeightAndReduceDelegate())
    expected = x * (weights * (ids >= 0)).sum(1, keepdim=True)
    torch.testing.assert_close(output, expected)
