"""Rows between ranks through each other's memory; all ranks live in this process here."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.kernels.peer_all_to_all import (
    announce_outputs,
    combine,
    combine_reference,
    copy_rows,
    dispatch,
    dispatch_reference,
    settled,
    wait_for_dispatch,
    wait_for_outputs,
)
from fusedmoe.kernels.peer_layout import LateRows, PeerLayout, PeerView
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP4_DYNAMIC,
    MXFP8_DYNAMIC,
    fp8_dynamic_group,
)
from fusedmoe.tuning.peer_tiles import PeerTiles

pytest.importorskip("triton")

OWNERS = torch.tensor([0, 0, 1, 1, 2, 3, 0], dtype=torch.int32)
GARBAGE = 0xFF  # NaN in every float format


def views_of(layout: PeerLayout) -> list[PeerView]:
    """Buffers full of garbage but for the flags."""
    buffers = []
    for _ in range(layout.world):
        memory = torch.full((layout.nbytes + 256,), GARBAGE, dtype=torch.uint8)
        own = memory[-memory.data_ptr() % 256 :][: layout.nbytes]
        own[layout.dispatch_flags_at :].zero_()
        buffers.append(own)
    bases = torch.tensor([own.data_ptr() for own in buffers])
    return [
        PeerView(layout, rank, bases, own, torch.tensor([1, 0, 0, 0]).int(), torch.zeros(1).int())
        for rank, own in enumerate(buffers)
    ]


def raise_combine_flags(views: list[PeerView], epoch: int) -> None:
    """As the other ranks would, whose combines run only after this rank's in one process."""
    for view in views:
        at = view.layout.combine_flags_at
        view.own[at : at + 4 * view.layout.world].view(torch.int32).fill_(epoch)


def inputs_of(layout: PeerLayout, tokens: tuple[int, ...], dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(T, layout.hidden, generator=generator).to(dtype) for T in tokens]
    ids = [torch.randint(-1, 9, (T, layout.topk), generator=generator) for T in tokens]
    weights = [torch.rand(T, layout.topk, generator=generator) for T in tokens]
    return x, ids, weights


@pytest.mark.parametrize("tokens", [(5, 3, 0, 2), (4, 4, 4, 4), (1, 1, 1, 1), (0, 0, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("announced", [False, True])
def test_rows_arrive_and_sums_come_back(dtype, tokens, announced):
    """Uneven ranks, ids of -1 and beyond the last expert, two rounds over the same memory.

    In one launch outputs are announced and fetched, or in several.
    """
    layout = PeerLayout(4, 5, 160, 4, dtype)
    views = views_of(layout)
    for epoch in (1, 2):
        rows = max(tokens)
        x, ids, weights = inputs_of(layout, tokens, dtype, epoch)
        for rank, view in enumerate(views):
            dispatch(
                *(x[rank], ids[rank], weights[rank], OWNERS, view, rows),
                **{"tiles": PeerTiles(3, 64, 4), "timeout_us": 0, "wait": False},
            )
        outputs = []
        for rank, view in enumerate(views):
            wait_for_dispatch(view, timeout_us=0)
            got = view.received(rows)
            want = dispatch_reference(x, ids, weights, OWNERS, layout, rows, rank)
            used = want.topk_ids >= 0
            sent = used.any(dim=1)
            assert torch.equal(got.topk_ids, want.topk_ids)
            assert torch.equal(got.topk_weights[used], want.topk_weights[used])
            assert torch.equal(got.hidden_states[sent], want.hidden_states[sent])
            got.outputs[sent] = torch.randn(int(sent.sum()), layout.hidden).to(dtype)
            outputs.append(got.outputs)
        if announced:
            for view in views:
                announce_outputs(view)
        else:
            raise_combine_flags(views, epoch)
        for rank, view in enumerate(views):
            out = torch.full((tokens[rank], layout.hidden), float("nan"), dtype=dtype)
            wait_for_outputs(view, timeout_us=0)
            combine(
                *(out, ids[rank], OWNERS, view, rows),
                **{"tiles": PeerTiles(2, 64, 4), "timeout_us": 0, "announce": not announced},
            )
            want = combine_reference(outputs, ids[rank], OWNERS, layout, rows, rank)
            assert torch.equal(out, want)
            assert view.error.item() == 0


@pytest.mark.parametrize("key", [None, INT8_DYNAMIC_TOKEN])
def test_rows_that_are_copied(key):
    """Ids come first, then all rows to all ranks; a row is there when its rank's flag says so."""
    layout = PeerLayout(4, 5, 96, 4, torch.float32, key)
    views, tokens = views_of(layout), (5, 3, 0, 2)
    for epoch in (1, 2):
        x, ids, weights = inputs_of(layout, tokens, torch.float32, epoch)
        for rank, view in enumerate(views):
            view.own[: layout.ids_at].fill_(GARBAGE)
            dispatch(
                *(x[rank], ids[rank], weights[rank], OWNERS, view, 5),
                **{"timeout_us": 0, "wait": False, "copied": True},
            )
        for rank in (3, 0, 2, 1):
            own = x[rank] if key is None else None
            for to in (r for r in range(4) if r != rank):
                copy_rows(views[rank], views[to].own, own, tokens[rank], 5)
        for rank, view in enumerate(views):
            wait_for_dispatch(view, timeout_us=0)
            got = view.received(5)
            own = x[rank] if key is None else None
            late = LateRows.over(got.hidden_states, view, 0, own)
            rows = settled(late)
            assert view.error.item() == 0
            assert not isinstance(rows, LateRows)
            want = dispatch_reference(x, ids, weights, OWNERS, layout, 5, rank)
            sent = (want.topk_ids >= 0).any(dim=1)
            assert torch.equal(got.topk_ids, want.topk_ids)
            torch.testing.assert_close(rows[sent], want.hidden_states[sent], rtol=0, atol=1)
            if key is not None:
                torch.testing.assert_close(got.scales[sent], want.scales[sent])


def test_a_rank_whose_rows_never_come_is_named():
    layout = PeerLayout(4, 2, 64, 4, torch.float32)
    views = views_of(layout)
    x, ids, weights = inputs_of(layout, (2, 2, 2, 2), torch.float32, 0)
    for rank, view in enumerate(views):
        dispatch(
            *(x[rank], ids[rank], weights[rank], OWNERS, view, 2),
            **{"timeout_us": 0, "wait": False, "copied": True},
        )
    for rank in (1, 3):
        copy_rows(views[rank], views[0].own, x[rank], 2, 2)
    settled(LateRows.over(views[0].received(2).hidden_states, views[0], 3, x[0]))
    assert views[0].error.item() == 3
    plain = torch.zeros(3)
    assert settled(plain) is plain


def test_a_row_goes_nowhere_it_is_not_needed():
    layout = PeerLayout(4, 2, 64, 2, torch.float32)
    views = views_of(layout)
    x, weights = torch.randn(1, 64), torch.rand(1, 2)
    dispatch(
        *(x, torch.tensor([[2, 3]]), weights, OWNERS, views[0], 1),
        **{"timeout_us": 0, "wait": False},
    )
    assert torch.equal(views[1].received(1).hidden_states[0], x[0])
    for rank in (0, 2, 3):
        assert views[rank].received(1).hidden_states.isnan().all()
        assert views[rank].received(1).topk_ids[0].tolist() == [-1, -1]


@pytest.mark.parametrize(
    "key", [fp8_dynamic_group(32), FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN, MXFP8_DYNAMIC], ids=str
)
@pytest.mark.parametrize("hidden", [160, 200])
def test_rows_are_rounded_on_the_way(key, hidden):
    """As ``quantize_rows`` does: a row of tiny numbers, one of zeros.

    The interpreter loses the carry of fp8 where a mantissa rounds up: half of the number.
    """
    layout = PeerLayout(2, 3, hidden, 2, torch.float32, key)
    views = views_of(layout)
    owners = torch.tensor([0, 1], dtype=torch.int32)
    x, ids, weights = inputs_of(layout, (3, 2), torch.float32, 0)
    x[0][1] *= 1e-6
    x[0][2] = 0
    ids = [one % 2 for one in ids]
    for rank, view in enumerate(views):
        dispatch(
            *(x[rank], ids[rank], weights[rank], owners, view, 3),
            **{"tiles": PeerTiles(3, 64, 4), "timeout_us": 0, "wait": False},
        )
    for rank, view in enumerate(views):
        want = dispatch_reference(x, ids, weights, owners, layout, 3, rank)
        sent = (want.topk_ids >= 0).any(dim=1)
        got = view.received(3)
        found, wanted = (one.hidden_states[sent].float() for one in (got, want))
        zeros = wanted.abs().amax(1) == 0  # any scale serves them
        scales = (one.scales[sent][~zeros] for one in (got, want))
        torch.testing.assert_close(*scales, rtol=1e-6, atol=0.0)
        steps = (found - wanted).abs()
        allowed = 1.0 if key.dtype is torch.int8 else wanted.abs() * 0.51 + 2.0**-8
        assert (steps <= allowed).all()
        assert (steps > 0).float().mean() < 0.2


def test_a_missing_rank_is_named_and_nothing_waits_again():
    layout = PeerLayout(4, 2, 64, 2, torch.float32)
    views = views_of(layout)
    x, ids, weights = inputs_of(layout, (2, 2, 2, 2), torch.float32, 0)
    for rank in (0, 2, 3):
        dispatch(
            *(x[rank], ids[rank], weights[rank], OWNERS, views[rank], 2),
            **{"timeout_us": 0, "wait": False},
        )
    wait_for_dispatch(views[0], timeout_us=3)
    assert views[0].error.item() == 2
    wait_for_dispatch(views[0], timeout_us=1 << 30)


def test_outputs_that_are_not_announced_are_missed():
    layout = PeerLayout(4, 2, 64, 2, torch.float32)
    views = views_of(layout)
    x, ids, weights = inputs_of(layout, (2, 2, 2, 2), torch.float32, 0)
    for rank, view in enumerate(views):
        dispatch(
            *(x[rank], ids[rank], weights[rank], OWNERS, view, 2),
            **{"timeout_us": 0, "wait": False},
        )
    for rank in (0, 1, 3):
        announce_outputs(views[rank])
    wait_for_outputs(views[0], timeout_us=3)
    assert views[0].error.item() == 3


def test_a_rank_without_tokens_waits_for_the_others_too():
    """Its next dispatch would otherwise write what a slower rank's experts still read."""
    layout = PeerLayout(2, 2, 64, 2, torch.float32)
    views = views_of(layout)
    x, ids, weights = inputs_of(layout, (0, 2), torch.float32, 0)
    for rank, view in enumerate(views):
        dispatch(
            *(x[rank], ids[rank], weights[rank], OWNERS, view, 2),
            **{"timeout_us": 0, "wait": False},
        )
    combine(x[0].clone(), ids[0], OWNERS, views[0], 2, timeout_us=3)
    assert views[0].error.item() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 3}, "3 tokens need T <= rows = 2"),
        ({"rows": 9}, "rows = 9 <= 4"),
        ({"hidden": 65}, "columns"),
        ({"topk": 3}, "picks"),
        ({"dtype": torch.float16}, "float16"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layout = PeerLayout(4, 4, 64, 2, torch.float32)
    view = views_of(layout)[0]
    sizes = {"T": 2, "rows": 2, "hidden": 64, "topk": 2, "dtype": torch.float32} | change
    x = torch.zeros(sizes["T"], sizes["hidden"], dtype=sizes["dtype"])
    ids = torch.zeros(sizes["T"], sizes["topk"], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        dispatch(
            *(x, ids, torch.ones(ids.shape), OWNERS, view, sizes["rows"]),
            **{"timeout_us": 0},
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"world": 0},
        {"world": 3},
        {"rows": 0},
        {"key": FP8_DYNAMIC_TENSOR},
        {"key": fp8_dynamic_group(96)},
        {"key": INT8_STATIC_TENSOR},
        {"key": MXFP4_DYNAMIC},
    ],
)
def test_layouts_that_make_no_sense(fields):
    usual = {"world": 2, "rows": 4, "hidden": 64, "topk": 2, "dtype": torch.float32}
    with pytest.raises(ValueError, match=r"sizes|scales of their own|ranks"):
        PeerLayout(**(usual | fields))
