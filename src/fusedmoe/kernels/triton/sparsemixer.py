"""Phi-MoE's sparsemixer in one launch: two rounds of best expert and softmax over its neighbours.

Grid cdiv(T, BLOCK_T): one program owns BLOCK_T tokens and all their candidates.

logits [T, E + Z], scale fp [E], is_padding bool [T] -> as ``routing.py``. A logit that is NaN or
infinite cannot be chosen and is nobody's neighbour.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.routing import TOKENS_PER_PROGRAM, flat, routing_case
from fusedmoe.kernels.triton.routing_steps import NO_ID, finish_rows, finite_or, softcap
from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors


@triton.jit
def sparsemixer_round(remaining, magnitude, column_ids, TWICE_EPSILON: tl.constexpr):
    """Best remaining candidate: its id (-1 where none is left) and its share of the near ones."""
    best = tl.max(remaining, axis=1)
    ids = tl.min(tl.where(remaining == best[:, None], column_ids, NO_ID), axis=1)
    below = best[:, None] - remaining
    far = below / tl.maximum(magnitude, best[:, None]) > TWICE_EPSILON
    near = tl.where(far, 0.0, tl.exp(-below))
    return 1.0 / tl.sum(near, axis=1), tl.where(best > float("-inf"), ids, -1)


@triton.jit(do_not_specialize=["num_tokens"])
def sparsemixer_kernel(
    logits_ptr,
    scale_ptr,
    padding_ptr,
    weights_ptr,
    ids_ptr,
    zero_weight_ptr,
    num_tokens,
    stride_row,
    stride_expert,
    stride_padding,
    CASE: tl.constexpr,
):
    BLOCK_T: tl.constexpr = CASE.BLOCK_T
    SOFTCAP: tl.constexpr = CASE.spec.logit_softcap
    TWICE_EPSILON: tl.constexpr = 2.0 * CASE.spec.sparsemixer_epsilon
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < num_tokens
    column = tl.arange(0, CASE.BLOCK_S)[None, :]
    candidate = column < CASE.CANDIDATES
    x = tl.load(
        logits_ptr + rows[:, None] * stride_row + column.to(tl.int64) * stride_expert,
        mask=row_mask[:, None] & candidate,
        other=0.0,
    ).to(tl.float32)
    x = softcap(x, SOFTCAP)
    remaining = tl.where(candidate, finite_or(x, float("-inf")), float("-inf"))
    first_weight, first = sparsemixer_round(remaining, tl.abs(x), column, TWICE_EPSILON)
    remaining = tl.where(column == first[:, None], float("-inf"), remaining)
    second_weight, second = sparsemixer_round(remaining, tl.abs(x), column, TWICE_EPSILON)
    slot = tl.arange(0, CASE.BLOCK_K)[None, :]
    ids = tl.where(slot == 0, first[:, None], tl.where(slot == 1, second[:, None], -1))
    weights = tl.where(slot == 0, first_weight[:, None], second_weight[:, None])
    finish_rows(
        weights, ids, scale_ptr, padding_ptr, weights_ptr, ids_ptr, zero_weight_ptr, rows, row_mask,
        stride_padding, CASE,
    )  # fmt: skip


def launch_sparsemixer(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors,
    is_padding: torch.Tensor | None,
    result: RoutingResult,
) -> None:
    """Fill ``result``; arguments are checked by the caller."""
    num_tokens = logits.shape[0]
    case, num_warps = routing_case(spec, False, TOKENS_PER_PROGRAM)
    sparsemixer_kernel[(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM),)](
        logits,
        flat(tensors.per_expert_scale),
        is_padding,
        *result,
        num_tokens,
        *logits.stride(),
        0 if is_padding is None else is_padding.stride(0),
        CASE=case,
        num_warps=num_warps,
    )
