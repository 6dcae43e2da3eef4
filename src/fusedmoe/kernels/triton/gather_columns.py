"""Rows of x by slot, their columns in the order of the slot's expert.

Grid (slots, cdiv(H, BLOCK)). x [T, H], rows dense; order int32 [e, H]; ids [slots]; out [slots, H].
Columns out of range count as the nearest one; slots without an expert are left alone.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2


@triton.jit
def gather_columns_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    num_mapped,
    e,
    H,
    stride_xm,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    slot = tl.program_id(0).to(tl.int64)
    expert = local_expert(tl.load(ids_ptr + slot), map_ptr, num_mapped, e)
    if expert < 0:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(order_ptr + expert.to(tl.int64) * H + at, at < H, 0)
    column = tl.minimum(tl.maximum(column, 0), H - 1)
    value = tl.load(x_ptr + slot // TOP_K * stride_xm + column)
    tl.store(out_ptr + slot * H + at, value, at < H)


_launch = Launcher(gather_columns_kernel, chained=True)


def launch(
    x: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> None:
    """As ``gather_columns``, unchecked."""
    (T, H), slots = x.shape, topk_ids.numel()
    if slots == 0 or H == 0:
        return
    block = min(1024, power_of_2(H))
    _launch(
        (slots, -(-H // block)),
        (x, order, out, topk_ids, expert_map),
        (0 if expert_map is None else expert_map.shape[0], order.shape[0], H, x.stride(0)),
        (slots // T, block),
        max(1, block // 256),
    )
