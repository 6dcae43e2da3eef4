"""Rows to their experts and back.

gather_rows: grid (R,), program r copies the row of sorted slot r, writes its entry of the inverse
table, marks slot r itself where it has no expert, and writes the offsets of the experts that begin
there. unpermute: grid (T, cdiv(H, BLOCK_H)), a program adds one token's rows in the order of K.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, power_of_2


@triton.jit(do_not_specialize=("R", "num_rows"))
def gather_rows_kernel(
    x_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    sorted_ptr,
    row_experts_ptr,
    num_rows_ptr,
    inverse_ptr,
    offsets_ptr,
    R,
    H,
    K,
    e,
    num_mapped,
    stride_xt,
    stride_xh,
    stride_or,
    stride_oh,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    rows = tl.load(num_rows_ptr)
    if local_expert(tl.load(ids_ptr + row), map_ptr, num_mapped, e) < 0:
        tl.store(inverse_ptr + row, R)
    # Experts from the one after the previous row's up to this row's begin here; e stands for the
    # end of all rows.
    before = tl.load(row_experts_ptr + row - 1, (row > 0) & (row <= rows), -1)
    here = tl.load(row_experts_ptr + row, row < rows, e)
    if row <= rows:
        for expert in range(before + 1, here + 1):
            tl.store(offsets_ptr + expert, row.to(tl.int64))
    if row >= rows:
        return
    if row == R - 1:
        for expert in range(here + 1, e + 1):
            tl.store(offsets_ptr + expert, rows.to(tl.int64))
    slot = tl.load(sorted_ptr + row)
    tl.store(inverse_ptr + slot, row)
    x_ptr += (slot // K).to(tl.int64) * stride_xt
    out_ptr += row.to(tl.int64) * stride_or
    for first in range(0, H, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(x_ptr + column * stride_xh, column < H)
        tl.store(out_ptr + column * stride_oh, values, column < H)


@triton.jit(do_not_specialize=("R", "num_rows"))
def unpermute_kernel(
    rows_ptr,
    weights_ptr,
    inverse_ptr,
    offsets_ptr,
    out_ptr,
    num_rows,
    e,
    H,
    K,
    stride_r,
    stride_h,
    stride_wt,
    stride_wk,
    stride_ot,
    stride_oh,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    inside = column < H
    valid = num_rows
    if offsets_ptr is not None:
        valid = tl.minimum(tl.load(offsets_ptr + e), num_rows).to(tl.int32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for pick in range(0, K):
        row = tl.load(inverse_ptr + token * K + pick)
        live = (row >= 0) & (row < valid)
        weight = tl.load(weights_ptr + token * stride_wt + pick * stride_wk, live, 0.0)
        at = row.to(tl.int64) * stride_r + column * stride_h
        values = tl.load(rows_ptr + at, inside & live, 0.0).to(tl.float32)
        total += tl.where(live, values * weight.to(tl.float32), 0.0)
    tl.store(out_ptr + token * stride_ot + column * stride_oh, total, inside)


_launch_gather = Launcher(gather_rows_kernel)
_launch_unpermute = Launcher(unpermute_kernel)


def gather_rows(
    hidden_states: torch.Tensor,
    permuted: torch.Tensor,
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    tables: MoEAlignment,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """As ``gather_rows_reference``, on the device."""
    (T, H), R = hidden_states.shape, ids.numel()
    if R == 0:
        offsets.zero_()
        return
    block = min(2048, power_of_2(H))
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    strides = (*hidden_states.stride(), *permuted.stride())
    _launch_gather(
        (R, 1),
        (hidden_states, permuted, ids, expert_map, *tables, inverse, offsets),
        (R, H, R // T, offsets.shape[0] - 1, num_mapped, *strides),
        (block,),
        max(1, block // 512),
    )


def unpermute(
    out: torch.Tensor,
    permuted: torch.Tensor,
    topk_weights: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor | None,
) -> None:
    """As ``unpermute_reference``, on the device."""
    (T, K), H = topk_weights.shape, out.shape[1]
    if T == 0 or H == 0:
        return
    block = min(1024, power_of_2(max(32, H)))
    e = 0 if offsets is None else offsets.shape[0] - 1
    strides = (*permuted.stride(), *topk_weights.stride(), *out.stride())
    _launch_unpermute(
        (T, -(-H // block)),
        (permuted, topk_weights, inverse, offsets, out),
        (permuted.shape[0], e, H, K, *strides),
        (block,),
        max(1, block // 256),
    )
