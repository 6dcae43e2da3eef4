"""A layer over several ranks computes what one rank does, for every way to place tokens."""

from __future__ import annotations

import pytest
from rank_layers import (
    SPREADS,
    Layout,
    check_batch_invariance,
    check_companions,
    check_compiled,
    check_fewer_experts,
    check_layout,
    check_one_operator,
    run_with,
)

EVERYWHERE = {
    "tp": Layout(tp=2),
    "tp4": Layout(tp=4),
    "ep": Layout(tp=2, ep=True),
    "ep4": Layout(tp=4, ep=True),
    "dp": Layout(dp=2),
    "dp4": Layout(dp=4),
    "dp_ep": Layout(dp=2, ep=True),
    "dp4_ep": Layout(dp=4, ep=True),
    "dp4_ep_given": Layout(dp=4, ep=True, spanning=True),
    "pcp": Layout(pcp=2),
    "pcp_tp": Layout(pcp=2, tp=2),
    "pcp_ep": Layout(pcp=2, ep=True),
    "pcp4_ep": Layout(pcp=4, ep=True),
    "dp_pcp_ep": Layout(dp=2, pcp=2, ep=True),
    "dp_pcp_ep_given": Layout(dp=2, pcp=2, ep=True, spanning=True),
    "sp_ep": Layout(tp=2, ep=True, sp=True),
    "sp4_ep": Layout(tp=4, ep=True, sp=True),
    "dp_sp_ep": Layout(dp=2, tp=2, ep=True, sp=True),
    "dp_sp_ep_given": Layout(dp=2, tp=2, ep=True, sp=True, spanning=True),
    "dp_tp": Layout(dp=2, tp=2),
    "dp_tp_ep": Layout(dp=2, tp=2, ep=True),
    "pcp_tp_ep_given": Layout(pcp=2, tp=2, ep=True, spanning=True),
}
MOVING = {name: layout for name, layout in EVERYWHERE.items() if layout.token_ranks > 1}
EXCHANGING = {
    name: layout
    for name, layout in MOVING.items()
    if layout.ep and name not in ("dp_pcp_ep", "dp_sp_ep")
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_the_chosen_way(ranks, name):
    ranks.run(check_layout, EVERYWHERE[name], "")


@pytest.mark.parametrize("name", EXCHANGING)
def test_all_to_all(ranks, name):
    ranks.run(check_layout, EXCHANGING[name], "all_to_all")


@pytest.mark.parametrize("name", [n for n, one in EVERYWHERE.items() if one.token_ranks == 1])
def test_rows_by_expert_where_ranks_hold_the_same_tokens(ranks, name):
    arguments = {"mover": "batched", "max_num_tokens": 9}
    ranks.run(run_with, EVERYWHERE[name], arguments | {"spreads": SPREADS})
    if EVERYWHERE[name].ep:
        to_one = {"to_one_rank": True, "top_k": 1, "renormalize": False}
        ranks.run(run_with, EVERYWHERE[name], arguments | to_one)


@pytest.mark.parametrize(
    ("name", "mover"),
    [(n, "") for n, one in EVERYWHERE.items() if one.ep] + [(n, "all_to_all") for n in EXCHANGING],
)
def test_all_tokens_go_to_one_rank(ranks, name, mover):
    arguments = {"mover": mover, "to_one_rank": True, "top_k": 1, "renormalize": False}
    ranks.run(run_with, EVERYWHERE[name], arguments)


@pytest.mark.parametrize(("name", "mover"), [("ep4", ""), ("dp4_ep", ""), ("dp4_ep", "all_to_all")])
def test_ranks_without_experts(ranks, name, mover):
    ranks.run(check_fewer_experts, EVERYWHERE[name], mover)


@pytest.mark.parametrize(
    ("name", "mover"), [("tp4", ""), ("sp4_ep", ""), ("dp_tp_ep", ""), ("dp4_ep", "all_to_all")]
)
def test_what_is_beside_the_tokens(ranks, name, mover):
    ranks.run(check_companions, EVERYWHERE[name], mover)


@pytest.mark.parametrize("name", ["dp4_ep", "dp_sp_ep", "dp_tp"])
def test_counts_may_be_given(ranks, name):
    ranks.run(check_layout, MOVING[name], "naive_dp_ep", ("even", "uneven"), True)


@pytest.mark.parametrize("name", ["tp4", "ep4", "dp_tp", "dp4_ep"])
def test_batch_invariance_over_ranks(ranks, name):
    ranks.run(check_batch_invariance, EVERYWHERE[name])


@pytest.mark.parametrize("name", ["dp4_ep", "dp_tp"])
def test_compiled(ranks, name):
    ranks.run(check_compiled, EVERYWHERE[name])


@pytest.mark.parametrize("name", ["tp4", "ep"])
def test_compiled_as_one_operator(ranks, name):
    ranks.run(check_one_operator, EVERYWHERE[name])


@pytest.mark.parametrize("name", EVERYWHERE)
def test_experts_that_route_by_themselves(ranks, name):
    arguments = {"experts": "cpu_monolithic"}
    ranks.run(run_with, EVERYWHERE[name], arguments | {"spreads": SPREADS})
    if EVERYWHERE[name].ep:
        to_one = {"to_one_rank": True, "top_k": 1, "renormalize": False}
        ranks.run(run_with, EVERYWHERE[name], arguments | to_one)


@pytest.mark.parametrize("name", ["dp4_ep", "dp_tp_ep", "tp"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"n_shared_experts": 1, "shared": False},
        {"zero_expert_type": "identity", "shared": False, "zero_experts": 2},
        {"expert_placement": "round_robin"},
        {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
        {"apply_router_weight_on_input": True, "top_k": 1},
        {"num_redundant_experts": 2, "enable_eplb": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_stands_around_the_experts_counts_once(ranks, name, arguments):
    if name == "tp" and "expert_placement" in arguments:
        pytest.skip("every rank has a part of each expert")
    ranks.run(run_with, EVERYWHERE[name], arguments)
