"""The transfer plan: every slot gets its expert, in rounds without a busy rank."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmoe.eplb.transfer import Transfer, make_transfer_plan


def carried_out(before, after):
    """The slots after a plan, by moving labels as the executor moves rows."""
    plan = make_transfer_plan(before, after)
    result = [[None] * len(new) for new in after]
    for rank, slot in plan.kept:
        result[rank][slot] = before[rank][slot]
    for rank, old, new in plan.local:
        result[rank][new] = before[rank][old]
    for batch in plan.batches:
        senders = [one.source_rank for one in batch]
        receivers = [one.target_rank for one in batch]
        assert len(set(senders)) == len(senders)
        assert len(set(receivers)) == len(receivers)
        for one in batch:
            assert one.source_rank != one.target_rank
            result[one.target_rank][one.target_slot] = before[one.source_rank][one.source_slot]
    for rank, slot, again in plan.copies:
        result[rank][again] = result[rank][slot]
    return result


PLACEMENT = st.lists(st.integers(0, 5), min_size=6, max_size=6)


@settings(max_examples=100, deadline=None)
@given(PLACEMENT, PLACEMENT, st.sampled_from([1, 2, 3]))
def test_every_slot_gets_its_expert(extra_before, extra_after, width):
    """Slots of 12 experts' copies over ranks, before and after, in any arrangement."""
    before = [*range(6), *extra_before]
    after = [*extra_after, *range(6)]
    old = [before[i : i + 2 * width] for i in range(0, 12, 2 * width)]
    new = [after[i : i + 2 * width] for i in range(0, 12, 2 * width)]
    assert carried_out(old, new) == new
    assert make_transfer_plan(old, old).is_empty


def test_ranks_may_join_and_leave():
    two, four = [[0, 1, 2, 3], [4, 5, 0, 1]], [[0, 1], [4, 5], [2, 3], [0, 4]]
    assert carried_out([*two, [], []], four) == four
    back = [*two, [], []]
    assert carried_out(four, back) == back


def test_senders_share_the_receivers():
    """Two ranks have the expert, five need it: two each in a row, the last one to the first."""
    before = [[0], [0], [1], [2], [3], [4], [5]]
    after = [[1], [2], [0], [0], [0], [0], [0]]
    plan = make_transfer_plan([*before[:2], *before[2:]], after)
    sent = {
        one.target_rank: one.source_rank
        for batch in plan.batches
        for one in batch
        if one.target_rank >= 2
    }
    assert sent == {2: 0, 3: 0, 4: 1, 5: 1, 6: 0}
    assert sum(map(len, plan.batches)) == 7


def test_what_stays_does_not_travel():
    plan = make_transfer_plan([[0, 1, 2], [3, 4, 5]], [[1, 1, 3], [3, 0, 3]])
    assert plan.local == ((0, 1, 0), (1, 0, 2))
    assert plan.kept == ((0, 1), (1, 0))
    assert plan.batches == ((Transfer(0, 0, 1, 1), Transfer(1, 0, 0, 2)),)
    twice = make_transfer_plan([[0, 1], [2, 3]], [[2, 2], [0, 1]])
    assert twice.copies == ((0, 0, 1),)


def test_an_expert_that_nobody_has():
    with pytest.raises(ValueError, match="no rank has expert 7"):
        make_transfer_plan([[0], [1]], [[7], [1]])
    with pytest.raises(ValueError, match="2 ranks before, 1 after"):
        make_transfer_plan([[0], [1]], [[0]])
