"""Weighted sum over the K picks of each valid token.

Grid (programs, cdiv(H, BLOCK_H)): a program takes every ``programs``-th token until the valid ones
end, and adds the token's picks in order, in fp32. A token's bits depend on nothing but that token.

rows [T, K, H] of any strides, weights [T, K] or None, routing as in ``BoundedRouting`` ->
out [T, H]. Rows and weights of slots without a local expert are not read.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.bounded_align import BoundedRouting
from fusedmoe.kernels.triton.bounded_align import expert_here, valid_slots
from fusedmoe.kernels.triton.launch import Launcher, power_of_2


@triton.jit(do_not_specialize=["T"])
def bounded_sum_kernel(
    rows_ptr,
    weights_ptr,
    ids_ptr,
    num_valid_ptr,
    out_ptr,
    T,
    H,
    first_expert,
    num_local,
    stride_rt,
    stride_rk,
    stride_rh,
    stride_wt,
    stride_wk,
    stride_ot,
    stride_oh,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    inside = column < H
    valid = valid_slots(num_valid_ptr, 1, T)
    token = tl.program_id(0).to(tl.int64)
    for _ in range(tl.program_id(0), valid, tl.num_programs(0)):
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        for first in range(0, K, UNROLL):
            for offset in tl.static_range(UNROLL):
                pick = first + offset
                expert = tl.load(ids_ptr + token * K + pick, pick < K, -1)
                here = (pick < K) & (expert_here(expert, first_expert, num_local) >= 0)
                at = token * stride_rt + pick * stride_rk
                row = tl.load(rows_ptr + at + column * stride_rh, inside & here, 0.0)
                row = row.to(tl.float32)
                if weights_ptr is not None:
                    at_weight = token * stride_wt + pick * stride_wk
                    row *= tl.load(weights_ptr + at_weight, here, 0.0).to(tl.float32)
                total += row
        tl.store(out_ptr + token * stride_ot + column * stride_oh, total, inside)
        token += tl.num_programs(0)


_launch = Launcher(bounded_sum_kernel)


def weigh_and_add(
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    routing: BoundedRouting,
    out: torch.Tensor,
    expected_tokens: int | None = None,
) -> torch.Tensor:
    """As ``bounded_sum``, unchecked."""
    T, K, H = rows.shape
    if T == 0 or H == 0 or K == 0:
        return out
    programs = T if expected_tokens is None else max(1, min(expected_tokens, T))
    # Narrow blocks while tokens are few, so that the sum spreads over the whole device.
    widest = 2048 if programs >= 512 else 512 if programs >= 64 else 256
    block_h = min(widest, max(power_of_2(H), 32))
    _launch(
        (programs, -(-H // block_h)),
        (rows, topk_weights, routing.routing_map, routing.num_valid, out),
        (
            T,
            H,
            routing.first_expert,
            routing.num_local,
            *rows.stride(),
            *((0, 0) if topk_weights is None else topk_weights.stride()),
            *out.stride(),
        ),
        (K, min(power_of_2(K), 8), block_h),
        max(1, min(8, block_h // 256)),
    )
    return out
