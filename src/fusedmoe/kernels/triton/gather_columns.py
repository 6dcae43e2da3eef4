"""Rows of x by slot, their columns in the order of the slot's expert.

Grid (slots, cdiv(H, BLOCK)). x [T, H], rows dense; order int32 [e, H]; ids [slots]; out [slots, H].
Columns out of range count as the nearest one; slots without an expert are left alone. With position
[slots] a slot's row of x and of out is that one.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, power_of_2, stand_between
from fusedmoe.kernels.triton.quantized_common import place_of


@triton.jit
def gather_columns_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    position_ptr,
    num_mapped,
    e,
    H,
    stride_xm,
    TOP_K: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """FROM, TO: the orders of the table's and of out's columns (``kernels/column_orders.py``)."""
    stand_between(CHAINED)
    slot = tl.program_id(0).to(tl.int64)
    expert = local_expert(tl.load(ids_ptr + slot), map_ptr, num_mapped, e)
    if expert < 0:
        return
    row = slot // TOP_K
    if position_ptr is not None:
        slot = tl.load(position_ptr + slot).to(tl.int64)
        row = slot
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry, place = at, at
    if FROM != TO:
        entry, place = place_of(at, H, FROM), place_of(at, H, TO)
    column = tl.load(order_ptr + expert.to(tl.int64) * H + entry, at < H, 0)
    column = tl.minimum(tl.maximum(column, 0), H - 1)
    value = tl.load(x_ptr + row * stride_xm + column)
    tl.store(out_ptr + slot * H + place, value, at < H)


_launch = Launcher(gather_columns_kernel, chained=True)


def launch(
    x: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    orders: tuple[str, str] = ("", ""),
    position: torch.Tensor | None = None,
) -> None:
    """As ``gather_columns``, unchecked."""
    (T, H), slots = x.shape, topk_ids.numel()
    if slots == 0 or H == 0:
        return
    block = min(1024, power_of_2(H))
    _launch(
        (slots, -(-H // block)),
        (x, order, out, topk_ids, expert_map, position),
        (0 if expert_map is None else expert_map.shape[0], order.shape[0], H, x.stride(0)),
        (1 if position is not None else slots // T, *orders, block),
        max(1, block // 256),
    )
