"""Weighted sum over the K picks of each token.

Grid (T, cdiv(H, BLOCK_H)): one program owns BLOCK_H columns of one token and adds its picks in
order, in fp32, so the result depends on nothing but that token.

inputs [T, K, H] of any strides -> out [T, H]. Weights [T, K], ids [T, K], expert_map [global] and
num_valid int32 [1] may each be None. Rows of ids without a local expert are not read.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, power_of_2

ANY_EXPERT = 2**31 - 1


@triton.jit
def mul_sum_kernel(
    x_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    num_valid_ptr,
    out_ptr,
    H,
    num_mapped,
    num_local,
    stride_xt,
    stride_xk,
    stride_xh,
    stride_wt,
    stride_wk,
    stride_it,
    stride_ik,
    stride_ot,
    stride_oh,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if num_valid_ptr is not None:  # noqa: SIM102 (Triton does not short-circuit)
        if token >= tl.load(num_valid_ptr):
            return
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    inside = column < H
    x_ptr += token * stride_xt
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for first in range(0, K, UNROLL):
        for offset in tl.static_range(UNROLL):
            pick = first + offset
            live = pick < K
            if ids_ptr is not None:
                expert = tl.load(ids_ptr + token * stride_it + pick * stride_ik, live, -1)
                live = live & (local_expert(expert, map_ptr, num_mapped, num_local) >= 0)
            row = tl.load(x_ptr + pick * stride_xk + column * stride_xh, inside & live, 0.0)
            row = row.to(tl.float32)
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + token * stride_wt + pick * stride_wk, live, 0.0)
                row *= weight.to(tl.float32)
            total += row
    tl.store(out_ptr + token * stride_ot + column * stride_oh, total, inside)


_launch = Launcher(mul_sum_kernel)


def mul_sum(
    inputs: torch.Tensor,
    topk_weights: torch.Tensor | None,
    outputs: torch.Tensor,
    topk_ids: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    num_local_experts: int | None,
) -> None:
    T, K, H = inputs.shape
    if T == 0 or H == 0:
        return
    block_h, num_warps = _tile(T, H)
    weight_strides = (0, 0) if topk_weights is None else topk_weights.stride()
    id_strides = (0, 0) if topk_ids is None else topk_ids.stride()
    _launch(
        (T, -(-H // block_h)),
        (inputs, topk_weights, topk_ids, expert_map, num_valid_tokens, outputs),
        (
            H,
            0 if expert_map is None else expert_map.shape[0],
            ANY_EXPERT if num_local_experts is None else num_local_experts,
            *inputs.stride(),
            *weight_strides,
            *id_strides,
            *outputs.stride(),
        ),
        (K, min(power_of_2(K), 8), block_h),
        num_warps,
    )


def _tile(T: int, H: int) -> tuple[int, int]:
    """Narrow blocks while tokens are few, so that the sum spreads over the whole device."""
    widest = 2048 if T >= 512 else 512 if T >= 64 else 256
    block_h = min(widest, max(power_of_2(H), 32))
    return block_h, max(1, min(8, block_h // 256))
