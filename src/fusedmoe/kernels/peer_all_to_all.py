"""Rows to their experts' ranks and back through memory that all ranks of a host can address.

``dispatch`` sends each row once to every rank that holds one of its experts, or has the copy
engines bring all rows to all ranks; ``combine`` adds up what those ranks made of it. Triton bodies:
``kernels/triton/peer_dispatch.py`` and ``peer_combine.py``, the protocol ``peer_flags.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.peer_layout import LateRows, PeerLayout, PeerView, Received
from fusedmoe.kernels.quantize import quantize_rows_reference
from fusedmoe.tuning.peer_tiles import PeerTiles, adding_tiles, local_tiles, peer_tiles


def dispatch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    owners: torch.Tensor,
    here: PeerView,
    rows: int,
    *,
    timeout_us: int,
    wait: bool = True,
    copied: bool = False,
    tiles: PeerTiles | None = None,
) -> None:
    """Send x [T, H] with ids [T, K] and weights fp32 [T, K] to the ranks that hold the experts.

    ``owners`` int32 [experts]: the rank of each. ``rows`` is the same on all ranks and at least
    every rank's T; all ranks call ``dispatch``, then ``combine``, equally often. With ``wait``
    everything from the others has arrived when the launch ends; else ``wait_for_dispatch`` must
    follow. ``copied``: only ids and weights are sent, and ``copy_rows`` must follow on all ranks.
    Ids outside of ``owners`` count as -1.

    Raises ValueError where sizes do not fit the layout.
    """
    check_tokens(x, topk_ids, owners, here, rows)
    if topk_weights.shape != topk_ids.shape or topk_weights.dtype is not torch.float32:
        raise ValueError(
            f"topk_weights {tuple(topk_weights.shape)} {topk_weights.dtype} must be fp32 of the "
            f"shape of topk_ids {tuple(topk_ids.shape)}"
        )
    if x.dtype is not here.layout.dtype:
        raise ValueError(f"x is {x.dtype}, the buffers are for {here.layout.dtype}")
    from fusedmoe.kernels.triton import peer_dispatch as triton_kernels

    triton_kernels.dispatch(
        x if x.stride(1) == 1 else x.contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        owners,
        here,
        rows,
        tiles or (local_tiles(x.shape[1]) if copied else peer_tiles(rows, x.shape[1])),
        timeout_us,
        wait,
        copied,
    )


def copy_rows(
    here: PeerView,
    buffer: torch.Tensor,
    x: torch.Tensor | None,
    num_tokens: int,
    rows: int,
) -> None:
    """This rank's rows to the rank whose ``buffer`` uint8 [nbytes] is, on this stream.

    x [num_tokens, H] contiguous; None: as the last ``dispatch`` has rounded them. Copies between
    GPUs take no multiprocessor, which is why the flag is copied, too: while other kernels have all
    of them, no kernel could raise one.
    """
    layout, me, source = here.layout, here.rank, here.own

    def span(at: int, size: int) -> slice:
        return slice(at + me * rows * size, at + (me * rows + num_tokens) * size)

    there = span(layout.rows_at, layout.hidden * layout.row_dtype.itemsize)
    row_bytes = source[there] if x is None else x.view(-1).view(torch.uint8)
    if num_tokens:
        buffer[there].copy_(row_bytes, non_blocking=True)
    if num_tokens and layout.groups:
        scales = span(layout.scales_at, layout.groups * 4)
        buffer[scales].copy_(source[scales], non_blocking=True)
    flag = slice(layout.row_flags_at + 4 * me, layout.row_flags_at + 4 * me + 4)
    buffer[flag].copy_(here.state[1:2].view(torch.uint8), non_blocking=True)


def settled(x: torch.Tensor) -> torch.Tensor:
    """``x``, once all of it is here: for who knows no ``LateRows``."""
    if not isinstance(x, LateRows):
        return x
    from fusedmoe.kernels.triton import peer_flags as triton_kernels

    here, whole = x.here, x.plain()
    triton_kernels.wait(here, here.layout.row_flags_at, x.timeout_us)
    if x.own is not None:
        first = here.rank * (whole.shape[0] // here.layout.world)
        whole[first : first + x.own.shape[0]] = x.own
    return whole


def wait_for_dispatch(here: PeerView, *, timeout_us: int) -> None:
    """Wait until the rows of every rank's last ``dispatch`` have arrived here."""
    from fusedmoe.kernels.triton import peer_flags as triton_kernels

    triton_kernels.wait(here, here.layout.dispatch_flags_at, timeout_us)


def announce_outputs(here: PeerView, pushed: bool = False) -> None:
    """Tell all ranks that ``received(...).outputs`` are written, or with ``pushed`` the rows of
    picks; a ``combine`` or ``add_picks`` must follow."""
    from fusedmoe.kernels.triton import peer_flags as triton_kernels

    triton_kernels.announce(here, pushed)


def wait_for_outputs(here: PeerView, *, timeout_us: int) -> None:
    """Wait until every rank has announced its outputs. ``combine`` waits by itself, too."""
    from fusedmoe.kernels.triton import peer_flags as triton_kernels

    triton_kernels.wait(here, here.layout.combine_flags_at, timeout_us)


def combine(
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    owners: torch.Tensor,
    here: PeerView,
    rows: int,
    *,
    timeout_us: int,
    announce: bool = True,
    sent: bool = False,
    tiles: PeerTiles | None = None,
) -> None:
    """out [T, H] = the sum of what each token's ranks left in ``received(rows).outputs``.

    Tokens, ids, owners and ``rows`` are those of the dispatch. fp32, in the order of the ranks,
    rounded once. Without ``announce``, ``announce_outputs`` has been called. ``sent``: the ranks
    have sent their parts here (``kernels.peer_sums``), instead of leaving them to be fetched.
    """
    check_tokens(out, topk_ids, owners, here, rows)
    if out.stride(1) != 1:
        raise ValueError(f"out must have contiguous rows, its strides are {out.stride()}")
    from fusedmoe.kernels.triton import peer_combine as triton_kernels

    triton_kernels.combine(
        out,
        topk_ids.contiguous(),
        owners,
        here,
        rows,
        tiles or (adding_tiles(out.shape[1]) if sent else peer_tiles(*out.shape)),
        timeout_us,
        announce,
        sent,
    )


def check_tokens(
    x: torch.Tensor, topk_ids: torch.Tensor, owners: torch.Tensor, here: PeerView, rows: int
) -> None:
    """Raise ValueError where this rank's tokens x [T, H] do not fit the buffers."""
    layout = here.layout
    T, H = x.shape
    if topk_ids.shape != (T, layout.topk) or layout.hidden != H:
        raise ValueError(
            f"{T} rows of {H} columns with ids {tuple(topk_ids.shape)} do not fit buffers for "
            f"{layout.hidden} columns and {layout.topk} picks"
        )
    if not T <= rows <= layout.rows:
        raise ValueError(
            f"{T} tokens need T <= rows = {rows} <= {layout.rows}, the tokens per rank that the "
            "buffers hold"
        )
    if owners.dtype is not torch.int32 or owners.dim() != 1:
        raise ValueError(f"owners must be int32 [experts], got {owners.dtype} {owners.shape}")


def dispatch_reference(
    x: list[torch.Tensor],
    topk_ids: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
    owners: torch.Tensor,
    layout: PeerLayout,
    rows: int,
    rank: int,
) -> Received:
    """What ``rank`` has received after all ranks dispatched; zeros where nothing was sent."""
    slots = layout.world * rows
    hidden = owners.new_zeros(slots, layout.hidden, dtype=layout.row_dtype)
    scales = owners.new_zeros(slots, layout.groups, dtype=torch.float32)
    ids = owners.new_full((slots, layout.topk), -1)
    weights = owners.new_zeros(slots, layout.topk, dtype=torch.float32)
    for source in range(layout.world):
        known = (topk_ids[source] >= 0) & (topk_ids[source] < owners.shape[0])
        mine = known & (owners[topk_ids[source].where(known, 0).long()] == rank)
        T, first = x[source].shape[0], source * rows
        ids[first : first + T] = topk_ids[source].where(mine, -1).int()
        weights[first : first + T] = topk_weights[source].where(mine, 0)
        sent = mine.any(dim=1, keepdim=True)
        data = x[source]
        if layout.key is not None:
            data, row_scales = quantize_rows_reference(data, layout.key)
            scales[first : first + T] = row_scales.where(sent, 0)
        hidden[first : first + T] = data.float().where(sent, 0).to(layout.row_dtype)
    outputs = owners.new_zeros(slots, layout.hidden, dtype=layout.dtype)
    return Received(hidden, scales if layout.groups else None, ids, weights, outputs)


def combine_reference(
    outputs: list[torch.Tensor],
    topk_ids: torch.Tensor,
    owners: torch.Tensor,
    layout: PeerLayout,
    rows: int,
    rank: int,
) -> torch.Tensor:
    """The sums for ``rank``'s tokens out of every rank's outputs [world * rows, H]."""
    T = topk_ids.shape[0]
    known = (topk_ids >= 0) & (topk_ids < owners.shape[0])
    holders = owners[topk_ids.where(known, 0).long()].where(known, -1)
    total = outputs[0].new_zeros(T, layout.hidden, dtype=torch.float32)
    for source in range(layout.world):
        used = (holders == source).any(dim=1)
        part = outputs[source][rank * rows : rank * rows + T]
        total[used] += part[used].float()
    return total.to(layout.dtype)
