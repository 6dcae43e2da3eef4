"""Expert load balancing over four ranks, while the layers go on."""

from __future__ import annotations

import pytest
import rank_eplb


@pytest.mark.parametrize("use_async", [True, False])
def test_outputs_stay_while_experts_move(ranks, use_async):
    ranks.run(rank_eplb.check_balancing, use_async)


def test_placing_anew_on_request(ranks):
    ranks.run(rank_eplb.check_rearrange_now)


def test_an_expert_travels_with_all_of_its_tensors(ranks):
    ranks.run(rank_eplb.check_all_dtypes_travel_together)


@pytest.mark.parametrize("name", ["fp8_block", "int4_g32", "nvfp4"])
def test_quantized_experts_move_with_their_scales(ranks, name):
    ranks.run(rank_eplb.check_quantized_layer, name)


def test_ranks_join_and_leave(ranks):
    ranks.run(rank_eplb.check_elastic)


def test_layers_that_cannot_be_balanced_together(ranks):
    ranks.run(rank_eplb.check_refusals)
