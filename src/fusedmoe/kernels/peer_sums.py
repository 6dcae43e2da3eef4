"""Sums over a token's picks that go straight to the rank whose token it is.

``combine`` fetches what experts have left in their rank's memory. Where rows are many, the wire is
then idle while the experts sum and the memory while rows are fetched; a sum that stores each row
where it is wanted does both at once. Triton body: ``kernels/triton/peer_sums.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.mul_sum import moe_fused_mul_sum_reference
from fusedmoe.kernels.peer_layout import PeerLayout, PeerSums, PeerView


def send_sums(
    out: PeerSums,
    y: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
    position: torch.Tensor | None = None,
) -> None:
    """Send the weighted sum of each token's picks to ``received(rows).outputs`` of its rank.

    y [world * rows * K or more, H], rows dense; the row of slot ``i`` is ``i``, or ``position[i]``
    (int32). Weights [world * rows, K] (None: all one), ids, map and ``num_local_experts`` as
    ``moe_fused_mul_sum`` takes them. Of a token without a pick here nothing is sent. ``out`` is
    marked as sent. Raises ValueError where shapes disagree.
    """
    (S, K), H = topk_ids.shape, y.shape[1]
    layout = out.here.layout
    if tuple(out.shape) != (S, H) or y.dim() != 2 or y.stride(1) != 1:
        raise ValueError(
            f"rows {tuple(y.shape)} of strides {y.stride()} for ids {(S, K)} do not sum to "
            f"{tuple(out.shape)}"
        )
    count = y.shape[0] if position is None else position.shape[0]
    if count < S * K or out.rows * layout.world != S:
        raise ValueError(f"{S} tokens of {K} picks, but {count} rows of {out.rows} tokens per rank")
    if topk_weights is not None and topk_weights.shape != topk_ids.shape:
        raise ValueError(f"weights {tuple(topk_weights.shape)} for ids {(S, K)}")
    from fusedmoe.kernels.triton.peer_sums import send_sums as launch

    launch(
        out.here,
        out.rows,
        y,
        None if topk_weights is None else topk_weights.contiguous(),
        topk_ids.contiguous(),
        expert_map,
        num_local_experts,
        position,
    )
    out.sent = True


def send_rows(here: PeerView, rows: int, sums: torch.Tensor, topk_ids: torch.Tensor) -> None:
    """As ``send_sums``, of sums [world * rows, H] that are made already.

    topk_ids [world * rows, K]: a token whose ids are all -1 has no sum.
    """
    out = PeerSums.over(sums, here, rows)
    send_sums(out, sums, None, topk_ids.amax(dim=1, keepdim=True))


def send_sums_reference(
    inboxes: list[torch.Tensor],
    y: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    layout: PeerLayout,
    rows: int,
    rank: int,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
    position: torch.Tensor | None = None,
) -> None:
    """What ``rank`` writes to every rank's ``received(rows).outputs``, ``inboxes``."""
    (S, K), H = topk_ids.shape, y.shape[1]
    picked = y[: S * K] if position is None else y[position.long()]
    wide = picked.float().view(S, K, H)
    e = num_local_experts
    sums = moe_fused_mul_sum_reference(
        wide, topk_weights, None, topk_ids, expert_map, num_local_experts=e
    )
    live = moe_fused_mul_sum_reference(
        torch.ones_like(wide), None, None, topk_ids, expert_map, num_local_experts=e
    )
    for home in range(layout.world):
        mine = slice(home * rows, (home + 1) * rows)
        inbox = inboxes[home][rank * rows : (rank + 1) * rows]
        inbox.copy_(torch.where(live[mine] > 0, sums[mine].to(inbox.dtype), inbox))
