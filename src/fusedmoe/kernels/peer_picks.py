"""Rows of picks at the ranks whose tokens they are, where they are weighted and added up.

Where tokens are few thousand, a sum on the way back costs what its bytes take on the wire and no
more is hidden. A second product that stores each of its rows where the token's rank adds up
(``kernels/triton/hopper_pushed.py``) is on the wire while it multiplies; more bytes, but beside
it. Ranks that have only sums send those (``peer_sums``). Triton body:
``kernels/triton/peer_picks.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.mul_sum import moe_fused_mul_sum_reference
from fusedmoe.kernels.peer_all_to_all import check_tokens
from fusedmoe.kernels.peer_layout import PeerLayout, PeerView
from fusedmoe.tuning.peer_tiles import PeerTiles, picks_tiles


def add_picks(
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    owners: torch.Tensor,
    here: PeerView,
    rows: int,
    *,
    timeout_us: int,
    pushed: bool,
    announce: bool = True,
    tiles: PeerTiles | None = None,
) -> None:
    """As ``combine`` where ranks may have sent rows of picks: out [T, H] = the sum over a token's
    picks of weight times row, and of what ranks without rows have sent as sums.

    fp32, picks in their order, then sums in the order of ranks, rounded once. Weights fp32 [T, K];
    None: all one. ``pushed``: what this rank has sent, which it tells the others with ``announce``.

    Raises ValueError where sizes do not fit the layout, whose ``pushed_rows`` are the most rows.
    """
    check_tokens(out, topk_ids, owners, here, rows)
    if out.stride(1) != 1:
        raise ValueError(f"out must have contiguous rows, its strides are {out.stride()}")
    if topk_weights is not None and topk_weights.shape != topk_ids.shape:
        raise ValueError(f"weights {tuple(topk_weights.shape)} for ids {tuple(topk_ids.shape)}")
    if rows > here.layout.pushed_rows:
        raise ValueError(f"{rows} rows, but only {here.layout.pushed_rows} have room for picks")
    from fusedmoe.kernels.triton.peer_picks import add_picks as launch

    launch(
        out,
        topk_ids.contiguous(),
        None if topk_weights is None else topk_weights.contiguous(),
        owners,
        here,
        rows,
        tiles or picks_tiles(out.shape[1]),
        timeout_us,
        announce,
        pushed,
    )


def push_rows_reference(
    inboxes: list[torch.Tensor],
    y: torch.Tensor,
    topk_ids: torch.Tensor,
    layout: PeerLayout,
    rows: int,
) -> None:
    """What a rank that received ids [world * rows, K] pushes to every rank's
    ``received(rows).picks``, ``inboxes``: the row of y [world * rows * K, H] of each live slot."""
    for home in range(layout.world):
        mine = slice(home * rows * layout.topk, (home + 1) * rows * layout.topk)
        live = topk_ids.flatten()[mine] >= 0
        inboxes[home][live] = y[mine][live].to(layout.dtype)


def add_picks_reference(
    picks: torch.Tensor,
    outputs: torch.Tensor,
    pushed: list[bool],
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    owners: torch.Tensor,
    layout: PeerLayout,
    rows: int,
) -> torch.Tensor:
    """The sums of this rank's tokens, out of what has come: picks [rows * K, H] from the ranks that
    ``pushed``, outputs [world * rows, H] from the others."""
    T, K = topk_ids.shape
    known = (topk_ids >= 0) & (topk_ids < owners.shape[0])
    holders = owners[topk_ids.where(known, 0).long()].where(known, -1)
    rowwise = holders.new_tensor([*pushed, False], dtype=torch.bool)[holders.long()]
    mine = picks.view(rows, K, -1)[:T].float()
    total = moe_fused_mul_sum_reference(mine, topk_weights, None, holders.where(rowwise, -1))
    for source in range(layout.world):
        used = (holders == source).any(dim=1) & (not pushed[source])
        total[used] += outputs[source * rows : source * rows + T][used].float()
    return total.to(layout.dtype)
