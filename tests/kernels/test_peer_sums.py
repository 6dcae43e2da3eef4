"""Sums that go to the ranks whose tokens they are; all ranks live in this process here."""

from __future__ import annotations

import pytest
import torch
from test_peer_all_to_all import OWNERS, inputs_of, raise_combine_flags, views_of

from fusedmoe.kernels.mul_sum import moe_fused_mul_sum
from fusedmoe.kernels.peer_all_to_all import combine, dispatch
from fusedmoe.kernels.peer_layout import PeerLayout, PeerSums
from fusedmoe.kernels.peer_sums import send_rows, send_sums, send_sums_reference
from fusedmoe.tuning.peer_tiles import PeerTiles

pytest.importorskip("triton")

NAN = float("nan")


def made(tokens: tuple[int, ...], dtype: torch.dtype, picks: int = 3):
    """After a dispatch: layout, views, ids of each rank's own tokens and of what it received."""
    layout = PeerLayout(4, 5, 160, picks, dtype)
    views = views_of(layout)
    x, ids, weights = inputs_of(layout, tokens, dtype, 0)
    for rank, view in enumerate(views):
        dispatch(
            *(x[rank], ids[rank], weights[rank], OWNERS, view, max(tokens)),
            **{"tiles": PeerTiles(3, 64, 4), "timeout_us": 0, "wait": False},
        )
    return layout, views, ids, [view.received(max(tokens)) for view in views]


def poisoned(views, rows: int) -> list[torch.Tensor]:
    """What every rank will find, all of it NaN for now, there and here."""
    return [view.received(rows).outputs.fill_(NAN).clone() for view in views]


@pytest.mark.parametrize("tokens", [(5, 3, 0, 2), (4, 4, 4, 4), (0, 0, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_arrive_where_their_tokens_are(tokens, dtype, scattered, weighted):
    """Rows by slot, or anywhere among more rows that are NaN; a map or none; and then added up."""
    layout, views, ids, received = made(tokens, dtype)
    rows = max(tokens)
    wanted = poisoned(views, rows)
    for rank, (view, got) in enumerate(zip(views, received, strict=True)):
        R = got.topk_ids.numel()
        generator = torch.Generator().manual_seed(rank)
        y = torch.full((R + 7, layout.hidden), NAN, dtype=dtype)
        position = torch.randperm(R + 7, generator=generator)[:R].int() if scattered else None
        live = (got.topk_ids >= 0).flatten()
        at = torch.arange(R) if position is None else position.long()
        y[at[live]] = torch.randn(int(live.sum()), layout.hidden, generator=generator).to(dtype)
        weights = got.topk_weights if weighted else None
        expert_map = None if rank % 2 else torch.where(rank == OWNERS, 0, -1).int()
        arguments = (y, weights, got.topk_ids)
        kept = {"expert_map": expert_map, "num_local_experts": 9, "position": position}
        out = PeerSums.make(view, rows)
        assert not out.sent
        send_sums(out, *arguments, **kept)
        assert out.sent
        send_sums_reference(wanted, *arguments, layout, rows, rank, **kept)
    for view, want in zip(views, wanted, strict=True):
        found = view.received(rows).outputs
        torch.testing.assert_close(found, want, rtol=2e-3, atol=2e-3, equal_nan=True)
    raise_combine_flags(views, 1)
    for rank, view in enumerate(views):
        out = torch.full((tokens[rank], layout.hidden), NAN, dtype=dtype)
        combine(
            *(out, ids[rank], OWNERS, view, rows),
            **{"tiles": PeerTiles(2, 64, 4), "timeout_us": 0, "sent": True},
        )
        parts = view.received(rows).outputs.view(4, rows, -1)[:, : tokens[rank]].float()
        torch.testing.assert_close(out, parts.nan_to_num().sum(0).to(dtype), rtol=2e-3, atol=2e-3)
        assert view.error.item() == 0


def test_more_picks_than_a_word_has_bits():
    layout, views, _, received = made((2, 1, 1, 2), torch.float32, picks=34)
    want = poisoned(views, 2)
    for rank, (view, got) in enumerate(zip(views, received, strict=True)):
        y = torch.randn(got.topk_ids.numel(), layout.hidden)
        arguments = (y, got.topk_weights.nan_to_num(), got.topk_ids)
        send_sums(PeerSums.make(view, 2), *arguments)
        send_sums_reference(want, *arguments, layout, 2, rank)
    for view, one in zip(views, want, strict=True):
        found = view.received(2).outputs
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("knows", [False, True])
def test_a_sum_that_knows_sends_and_one_that_does_not_is_sent(knows):
    tokens = (2, 2, 1, 0)
    layout, views, _, received = made(tokens, torch.float32)
    want = poisoned(views, 2)
    for rank, (view, got) in enumerate(zip(views, received, strict=True)):
        slots = torch.randn(8, layout.topk, layout.hidden)
        weights = got.topk_weights.nan_to_num()
        out = PeerSums.make(view, 2).fill_(NAN)
        assert type(out[:3]) is torch.Tensor
        given = {"topk_ids": got.topk_ids}
        if knows:
            out = PeerSums.over(out, view, 2)
            moe_fused_mul_sum(slots, weights, out, **given)
            assert out.sent
            assert out.isnan().all()
        else:
            moe_fused_mul_sum(slots, weights, out[:], **given)
            send_rows(view, 2, out, got.topk_ids)
        send_sums_reference(want, slots.flatten(0, 1), weights, got.topk_ids, layout, 2, rank)
    for view, one in zip(views, want, strict=True):
        torch.testing.assert_close(view.received(2).outputs, one, equal_nan=True)


def test_a_sum_without_ids_stays_here():
    """Whose sums are wanted is then not known."""
    layout, views, _, _ = made((2, 2, 1, 0), torch.float32)
    out = PeerSums.make(views[0], 2).fill_(NAN)
    slots = torch.randn(8, layout.topk, layout.hidden)
    moe_fused_mul_sum(slots, None, out)
    assert not out.sent
    torch.testing.assert_close(out[:], slots.sum(1))


@pytest.mark.parametrize(
    ("rows", "columns", "picks", "message"),
    [(11, 160, 3, "12 tokens of 3 picks"), (36, 96, 3, "do not sum"), (36, 160, 2, "do not sum")],
)
def test_what_does_not_fit_is_refused(rows, columns, picks, message):
    _, views, _, _ = made((3, 3, 3, 3), torch.float32)
    ids = torch.zeros(12 if picks == 3 else 8, picks, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        send_sums(PeerSums.make(views[0], 3), torch.zeros(rows, columns), None, ids)
