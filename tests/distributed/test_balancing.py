"""Expert load balancing over four ranks, while the layers go on."""

from __future__ import annotations

import pytest
import rank_eplb
import torch
from rank_layers import Layout


@pytest.mark.parametrize("use_async", [True, False])
def test_outputs_stay_while_experts_move(ranks, use_async):
    ranks.run(rank_eplb.check_balancing, use_async)


@pytest.mark.parametrize(
    ("layout", "mover"),
    [
        (Layout(dp=4, ep=True, spanning=True), "all_to_all"),
        (Layout(tp=4, ep=True, sp=True, spanning=True), "all_to_all"),
        (Layout(tp=4, ep=True, spanning=True), None),
        (Layout(dp=2, tp=2, ep=True, spanning=True), None),
    ],
    ids=str,
)
def test_however_tokens_reach_the_experts(ranks, layout, mover):
    ranks.run(rank_eplb.check_balancing_elsewhere, layout, mover)


def test_placing_anew_on_request(ranks):
    ranks.run(rank_eplb.check_rearrange_now)


def test_loading_anew(ranks):
    ranks.run(rank_eplb.check_loading_anew)


def test_another_default_device(ranks):
    ranks.run(rank_eplb.check_another_default_device)


def test_an_expert_travels_with_all_of_its_tensors(ranks):
    ranks.run(rank_eplb.check_all_dtypes_travel_together)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("fp8_block", torch.float32, 1e-5),
        ("nvfp4", torch.float32, 1e-5),
        ("mxfp4", torch.float32, 1e-5),
        ("int4_g32", torch.bfloat16, 2e-2),
        ("int8_channel", torch.bfloat16, 2e-2),
    ],
)
def test_quantized_experts_move_while_layers_go_on(ranks, name, dtype, tolerance):
    ranks.run(rank_eplb.check_quantized_while_serving, name, dtype, tolerance)


@pytest.mark.parametrize("name", [None, "fp8_channel"])
def test_ranks_join_and_leave(ranks, name):
    ranks.run(rank_eplb.check_elastic, name)


def test_layers_that_cannot_be_balanced_together(ranks):
    ranks.run(rank_eplb.check_refusals)
