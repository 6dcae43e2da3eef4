"""Weighted sum over the K picks of each valid token.

Grid (programs, cdiv(H, BLOCK_H)): a program takes every ``programs``-th token until the valid ones
end, and adds the token's picks in fp32, in one order. A token's bits depend on that token alone.

rows [R or P, H] of any strides, position int32 [R] or None, weights [T, K] or None, routing as in
``BoundedRouting`` -> out [T, H]. What belongs to slots without a local expert is not read.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.bounded_align import BoundedRouting
from fusedmoe.kernels.triton.bounded_align import expert_here, valid_slots
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2


@triton.jit(do_not_specialize=["T"])
def bounded_sum_kernel(
    rows_ptr,
    weights_ptr,
    ids_ptr,
    position_ptr,
    num_valid_ptr,
    out_ptr,
    T,
    H,
    first_expert,
    num_local,
    stride_rm,
    stride_rh,
    stride_wt,
    stride_wk,
    stride_ot,
    stride_oh,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    inside = column < H
    pick = tl.arange(0, PADDED_K)
    token = tl.program_id(0).to(tl.int64)
    for _ in range(tl.program_id(0), valid_slots(num_valid_ptr, 1, T), tl.num_programs(0)):
        slot = token * K + pick
        expert = tl.load(ids_ptr + slot, pick < K, -1)
        here = (pick < K) & (expert_here(expert, first_expert, num_local) >= 0)
        row = slot
        if position_ptr is not None:
            row = tl.load(position_ptr + slot, here, 0).to(tl.int64)
        at = row[:, None] * stride_rm + column[None, :] * stride_rh
        values = tl.load(rows_ptr + at, here[:, None] & inside[None, :], 0.0).to(tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + token * stride_wt + pick * stride_wk, here, 0.0)
            values *= weight.to(tl.float32)[:, None]
        tl.store(out_ptr + token * stride_ot + column * stride_oh, tl.sum(values, 0), inside)
        token += tl.num_programs(0)


_launch = Launcher(bounded_sum_kernel, chained=True)


def weigh_and_add(
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    routing: BoundedRouting,
    out: torch.Tensor,
    position: torch.Tensor | None = None,
    expected_tokens: int | None = None,
) -> torch.Tensor:
    """As ``bounded_sum``, unchecked."""
    (T, K), H = routing.routing_map.shape, rows.shape[1]
    if T == 0 or H == 0:
        return out
    programs = T if expected_tokens is None else max(1, min(expected_tokens, T))
    padded_k = power_of_2(K)
    # Narrow blocks while tokens are few, so that the sum spreads over the whole device.
    num_warps = 1 if programs <= 256 else 4
    block_h = max(32, min(256 * num_warps, 2048 * num_warps // padded_k, power_of_2(H)))
    _launch(
        (programs, -(-H // block_h)),
        (rows, topk_weights, routing.routing_map, position, routing.num_valid, out),
        (
            T,
            H,
            routing.first_expert,
            routing.num_local,
            *rows.stride(),
            *((0, 0) if topk_weights is None else topk_weights.stride()),
            *out.stride(),
        ),
        (K, padded_k, block_h),
        num_warps,
    )
    return out
