"""Rows of x by slot, their columns in the order of the slot's expert.

Device code: ``kernels/triton/gather_columns.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import dense
from fusedmoe.kernels.column_orders import REPEATS, ordered, unordered
from fusedmoe.kernels.ids import local_ids


def gather_columns(
    x: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    *,
    orders: tuple[str, str] = ("", ""),
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[slot, c] = x[slot // K, order[expert of slot, c]] for slots with an expert.

    x [T, H] with dense rows, order int32 [e, H] of columns of x, topk_ids int [T * K], out
    [T * K, H] contiguous in x's dtype; slots whose id names none of the e experts (after
    ``expert_map``) are left as they are. ``orders`` (``column_orders``): in which the table lies,
    and out shall. With ``position`` int32 [slots], the row of x and of out that each slot has, both
    are [rows, H]. Raises ValueError where shapes or dtypes disagree.
    """
    (T, H), slots = x.shape, topk_ids.numel()
    if any(H % REPEATS[name] for name in orders):
        raise ValueError(f"rows of {H} columns have none of the orders {orders}")
    if order.dim() != 2 or order.shape[1] != H or order.dtype != torch.int32:
        raise ValueError(f"order is {tuple(order.shape)} {order.dtype}, expected [e, {H}] int32")
    rows = slots if position is None else T
    if out.shape != (rows, H) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, expected {(rows, H)} {x.dtype}")
    if x.stride(1) != 1 or not order.is_contiguous() or not topk_ids.is_contiguous():
        raise ValueError("rows of x, order and topk_ids must be dense")
    if position is not None:
        if position.shape != (slots,) or position.dtype != torch.int32:
            raise ValueError(f"position is {tuple(position.shape)}, expected int32 {(slots,)}")
    elif slots % max(1, T):
        raise ValueError(f"{slots} slots are no multiple of {T} rows")
    if not x.is_cuda:
        return gather_columns_reference(x, order, out, topk_ids, expert_map, orders, position)
    from fusedmoe.kernels.triton.gather_columns import launch

    launch(x, order, out, topk_ids, dense(expert_map), orders, position)
    return out


def gather_columns_reference(
    x: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    orders: tuple[str, str] = ("", ""),
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in plain torch."""
    experts = local_ids(topk_ids.reshape(-1), order.shape[0], expert_map)
    slots = (experts >= 0).nonzero().squeeze(1)
    order = ordered(unordered(order, orders[0]), orders[1])
    K = topk_ids.numel() // max(1, x.shape[0])
    rows, to = (slots // max(1, K), slots) if position is None else (position[slots].long(),) * 2
    out[to] = x[rows].gather(1, order[experts[slots].long()].long())
    return out
