"""The object of one forward has everything of the one that ranks share, and its own sizes."""

from __future__ import annotations

import pytest

from fusedmoe.distributed.groups import TokenRanks
from fusedmoe.prepare_finalize.all_to_all import AllToAllPrepareAndFinalize
from fusedmoe.prepare_finalize.deepep_high_throughput import DeepEPHTPrepareAndFinalize
from fusedmoe.prepare_finalize.deepep_low_latency import DeepEPLLPrepareAndFinalize
from fusedmoe.prepare_finalize.naive_dp_ep import (
    MoEPrepareAndFinalizeNaiveDPEPModular,
    MoEPrepareAndFinalizeNaiveDPEPMonolithic,
)
from fusedmoe.prepare_finalize.peer import PeerPrepareAndFinalize
from fusedmoe.prepare_finalize.peer_batched import PeerBatchedPrepareAndFinalize

RANKS = TokenRanks(())


def on_peers(made):
    made.rows_may_be_late = True  # which the kernel says of its experts
    made.memory, made._may_send_sums, made.compares_sizes = object(), False, True
    return made


def batched_on_peers():
    made = on_peers(PeerBatchedPrepareAndFinalize(ranks=RANKS))
    made.num_local_experts = 4
    return made


MADE = {
    "naive": lambda: MoEPrepareAndFinalizeNaiveDPEPModular(True, ranks=RANKS, max_num_tokens=7),
    "monolithic": lambda: MoEPrepareAndFinalizeNaiveDPEPMonolithic(ranks=RANKS),
    "all_to_all": lambda: AllToAllPrepareAndFinalize(ranks=RANKS),
    "deep_ep": lambda: DeepEPHTPrepareAndFinalize(object(), ranks=RANKS, max_num_tokens=7),
    "deep_ep_low_latency": lambda: DeepEPLLPrepareAndFinalize(object(), ranks=RANKS),
    "peer": lambda: on_peers(PeerPrepareAndFinalize(ranks=RANKS)),
    "peer_batched": batched_on_peers,
}


@pytest.mark.parametrize("name", MADE)
def test_a_forward_begins_with_all_that_its_mover_has(name):
    shared = MADE[name]()
    if name in ("naive", "all_to_all"):
        shared.set_lora_context(object())
    one = shared.begin((3,))
    assert type(one) is type(shared)
    wanted = vars(shared) | {"_given_sizes": (3,)}
    assert {key: getattr(one, key) for key in wanted} == wanted
    assert shared._given_sizes is None
