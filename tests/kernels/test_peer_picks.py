"""Rows of picks added up where their tokens are; all ranks live in this process here."""

from __future__ import annotations

import pytest
import torch
from test_peer_all_to_all import GARBAGE, OWNERS, inputs_of, views_of

from fusedmoe.kernels.peer_all_to_all import announce_outputs, dispatch, wait_for_outputs
from fusedmoe.kernels.peer_layout import PeerLayout, PeerSums, taker_of_picks
from fusedmoe.kernels.peer_picks import add_picks, add_picks_reference, push_rows_reference
from fusedmoe.kernels.peer_sums import send_sums
from fusedmoe.tuning.peer_tiles import PeerTiles

pytest.importorskip("triton")

NAN = float("nan")


@pytest.mark.parametrize("tokens", [(5, 3, 0, 2), (4, 4, 4, 4), (0, 0, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pushed", [(1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_added_up_where_their_tokens_are(tokens, dtype, pushed, weighted):
    """Three picks, two forwards over the same memory, NaN wherever nothing was sent; ranks that
    push beside ranks that send sums, who take turns."""
    layout = PeerLayout(4, 5, 160, 3, dtype)
    views, rows = views_of(layout), max(tokens)
    for epoch in (1, 2):
        pushed = pushed[1:] + pushed[:1]
        x, ids, weights = inputs_of(layout, tokens, dtype, epoch)
        for rank, view in enumerate(views):
            view.own[layout.outputs_at : layout.dispatch_flags_at].fill_(GARBAGE)
            view.own[layout.kinds_at :].fill_(GARBAGE)
            dispatch(
                *(x[rank], ids[rank], weights[rank], OWNERS, view, rows),
                **{"tiles": PeerTiles(3, 64, 4), "timeout_us": 0, "wait": False},
            )
        received = [view.received(rows) for view in views]
        for rank, (view, got) in enumerate(zip(views, received, strict=True)):
            y = torch.randn(got.topk_ids.numel(), layout.hidden).to(dtype)
            y[(got.topk_ids < 0).flatten()] = NAN
            if pushed[rank]:
                inboxes = [one.picks for one in received]
                push_rows_reference(inboxes, y, got.topk_ids, layout, rows)
            else:
                kept = got.topk_weights if weighted else None
                send_sums(PeerSums.make(view, rows, takes_picks=True), y, kept, got.topk_ids)
            announce_outputs(view, bool(pushed[rank]))
        for rank, (view, got) in enumerate(zip(views, received, strict=True)):
            kept = weights[rank] if weighted else None
            out = torch.full((tokens[rank], layout.hidden), NAN, dtype=dtype)
            wait_for_outputs(view, timeout_us=0)
            add_picks(
                *(out, ids[rank], kept, OWNERS, view, rows),
                **{"tiles": PeerTiles(2, 64, 4), "timeout_us": 0, "announce": False},
                pushed=bool(pushed[rank]),
            )
            want = add_picks_reference(
                *(got.picks, got.outputs, [one > 0 for one in pushed]),
                *(ids[rank], kept, OWNERS, layout, rows),
            )
            assert torch.isfinite(out).all()
            torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
            assert view.error.item() == 0


def test_a_launch_tells_what_its_rank_has_sent():
    layout = PeerLayout(4, 2, 64, 2, torch.float32)
    views = views_of(layout)
    x, ids, weights = inputs_of(layout, (2, 2, 1, 0), torch.float32, 0)
    for rank, view in enumerate(views):
        dispatch(
            *(x[rank], ids[rank], weights[rank], OWNERS, view, 2),
            **{"timeout_us": 0, "wait": False},
        )
        add_picks(
            *(x[rank].clone(), ids[rank], None, OWNERS, view, 2), timeout_us=0, pushed=rank != 2
        )
    for view in views:
        assert view.own[layout.kinds_at :][:16].view(torch.int32).tolist() == [1, 1, 0, 1]
        flags = view.own[layout.combine_flags_at :][:16].view(torch.int32)
        assert flags.tolist() == [1, 1, 1, 1]


def test_a_rank_that_sends_nothing_is_named():
    """Also by one without tokens, whose next dispatch would write what others still read."""
    layout = PeerLayout(2, 2, 64, 2, torch.float32)
    x, ids, weights = inputs_of(layout, (0, 2), torch.float32, 0)
    for rank in (0, 1):
        views = views_of(layout)
        for one, view in enumerate(views):
            dispatch(
                *(x[one], ids[one], weights[one], OWNERS, view, 2),
                **{"timeout_us": 0, "wait": False},
            )
        out = x[rank].clone()
        add_picks(out, ids[rank], None, OWNERS, views[rank], 2, timeout_us=3, pushed=True)
        assert views[rank].error.item() == 2 - rank


def test_room_for_picks_lies_behind_the_sums():
    """As far as the layout has it, within the buffer, and nowhere over anything else."""
    layout = PeerLayout(2, 6, 24, 3, torch.float16, pushed_rows=4)
    view = views_of(PeerLayout(2, 6, 24, 3, torch.float16, pushed_rows=4))[0]
    for rows in range(1, 7):
        got = view.received(rows)
        assert (got.picks is not None) == (rows <= 4)
        if got.picks is not None:
            assert got.picks.shape == (rows * 3, 24)
            begin = got.picks.data_ptr() - view.own.data_ptr()
            assert begin == layout.picks_at(rows)
            assert begin >= layout.outputs_at + got.outputs.nbytes
            assert begin + got.picks.nbytes <= layout.dispatch_flags_at
    out, ids = torch.zeros(2, 24, dtype=torch.float16), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="5 rows, but only 4 have room"):
        add_picks(out, ids, None, OWNERS, view, 5, timeout_us=0, pushed=True)
    with pytest.raises(ValueError, match="weights"):
        add_picks(out, ids, torch.ones(2, 2), OWNERS, view, 4, timeout_us=0, pushed=True)


def test_only_a_whole_output_takes_picks():
    """A pass over some of the tokens would not know whose they are."""
    view = views_of(PeerLayout(2, 2, 64, 2, torch.float32))[0]
    sums = PeerSums.make(view, 2, takes_picks=True)
    assert taker_of_picks(sums) is sums
    assert taker_of_picks(sums[:2]) is None
    assert taker_of_picks(PeerSums.make(view, 2)) is None
