"""Routing in one launch: scores, bias, groups, top-k, renormalization, scales, empty slots.

Grid min(cdiv(T, BLOCK_T), MOST_PROGRAMS): a program owns BLOCK_T tokens at a time, with all their
candidates. The rule itself is ``route_rows`` (``routing_rows.py``).

logits [T, E + Z] of any float dtype and strides; bias, vision_bias fp [E + Z]; scale fp [E];
table int [vocab, K]; input_ids int [T]; is_padding bool [T]; each of them may be None.
-> weights fp32 [T, K + N], ids int [T, K + N], zero_weight fp32 [T] or None, all contiguous.

Phi-MoE's sparsemixer is a kernel of its own (``sparsemixer.py``), with the same last steps.

Invariants: fp32 arithmetic; other rows and their number change no bit of a row.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.kernels.triton.routing_rows import route_rows
from fusedmoe.kernels.triton.routing_steps import finish_rows
from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors


@triton.jit(do_not_specialize=["num_tokens", "num_table_rows"])
def routing_kernel(
    logits_ptr,
    bias_ptr,
    vision_bias_ptr,
    table_ptr,
    input_ids_ptr,
    scale_ptr,
    padding_ptr,
    weights_ptr,
    ids_ptr,
    zero_weight_ptr,
    num_tokens,
    num_table_rows,
    stride_row,
    stride_expert,
    stride_input_id,
    stride_padding,
    stride_table_row,
    stride_table_slot,
    SCORE: tl.constexpr,
    AFTER_TOPK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2: tl.constexpr,
    PER_GROUP: tl.constexpr,
    VISION_LO: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_ZERO: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    FLOOR: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    SHARED_WEIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        rows = block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        row_mask = rows < num_tokens
        weights, ids = route_rows(
            logits_ptr, bias_ptr, vision_bias_ptr, table_ptr, input_ids_ptr, rows, row_mask,
            stride_row, stride_expert, stride_input_id, num_table_rows, stride_table_row,
            stride_table_slot, SCORE, AFTER_TOPK, SOFTCAP, NUM_EXPERTS + NUM_ZERO, K, GROUPS,
            GROUP_SIZE, TOPK_GROUP, TOP2, PER_GROUP, VISION_LO, BLOCK_T, BLOCK_G, BLOCK_S, BLOCK_K,
        )  # fmt: skip
        finish_rows(
            weights, ids, scale_ptr, padding_ptr, weights_ptr, ids_ptr, zero_weight_ptr, rows,
            row_mask, stride_padding, NUM_EXPERTS, NUM_ZERO, NUM_SHARED, K, BLOCK_K, RENORMALIZE,
            EPSILON, FLOOR, NORM, SCALE, SHARED_WEIGHT,
        )  # fmt: skip


TOKENS_PER_PROGRAM = 1
MOST_PROGRAMS = 4096  # that run at once; to begin one takes about as long as its token


def routing_warps(columns: int) -> int:
    """One warp for a token's candidates, four from where they would fill its registers.

    A tile must not depend on the number of tokens, because the order of a softmax's sum does on
    the tile: so a token's weights have the same bits in any batch.
    """
    return 1 if columns <= 512 else 4


def routing_triton(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors,
    *,
    input_ids: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    indices_dtype: torch.dtype = torch.int32,
) -> RoutingResult:
    """As ``routing_reference``; arguments are checked by the caller."""
    num_tokens, candidates = logits.shape
    slots = spec.top_k + spec.num_fused_shared_experts
    weights = torch.empty((num_tokens, slots), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_tokens, slots), dtype=indices_dtype, device=logits.device)
    zero_weight = None
    if spec.num_zero_experts:
        zero_weight = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    result = RoutingResult(weights, ids, zero_weight)
    if num_tokens == 0:
        return result
    if spec.selection == "sparsemixer":
        from fusedmoe.kernels.triton.sparsemixer import launch_sparsemixer

        launch_sparsemixer(logits, spec, tensors, is_padding, result)
        return result
    table, vision_bias = tensors.hash_indices_table, flat(tensors.vision_bias)
    constants, num_warps = _constants(spec, candidates, vision_bias is not None, TOKENS_PER_PROGRAM)
    _launch(
        (min(MOST_PROGRAMS, -(-num_tokens // TOKENS_PER_PROGRAM)), 1),
        (
            logits,
            flat(tensors.correction_bias),
            vision_bias,
            table,
            input_ids,
            flat(tensors.per_expert_scale),
            is_padding,
            weights,
            ids,
            zero_weight,
        ),
        (
            num_tokens,
            0 if table is None else table.shape[0],
            *logits.stride(),
            0 if input_ids is None else input_ids.stride(0),
            0 if is_padding is None else is_padding.stride(0),
            *((0, 0) if table is None else table.stride()),
        ),
        constants,
        num_warps,
    )
    return result


@lru_cache(maxsize=256)
def _constants(
    spec: RoutingSpec, candidates: int, vision: bool, block_t: int
) -> tuple[tuple[Any, ...], int]:
    """The kernel's compile-time arguments in its order, and its warps."""
    groups = max(spec.num_expert_group, 1)
    block_g, block_s = power_of_2(groups), power_of_2(candidates // groups)
    by_name = finish_constants(spec) | {
        "SCORE": spec.score_function,
        "AFTER_TOPK": spec.score_after_topk,
        "SOFTCAP": float(spec.logit_softcap),
        "GROUPS": groups,
        "GROUP_SIZE": candidates // groups,
        "TOPK_GROUP": spec.topk_group,
        "TOP2": spec.group_score == "top2_sum",
        "PER_GROUP": spec.top_k // groups if spec.selection == "topk_per_group" else 0,
        "VISION_LO": spec.image_sentinel_lo if vision else 0,
        "BLOCK_T": block_t,
        "BLOCK_G": block_g,
        "BLOCK_S": block_s,
    }
    names = [name for name in routing_kernel.arg_names if name in by_name]
    return tuple(by_name[name] for name in names), routing_warps(block_g * block_s)


_launch = Launcher(routing_kernel, chained=True)


def finish_constants(spec: RoutingSpec) -> dict[str, Any]:
    """The compile-time arguments of ``finish_rows``."""
    return {
        "NUM_EXPERTS": spec.num_experts,
        "NUM_ZERO": spec.num_zero_experts,
        "NUM_SHARED": spec.num_fused_shared_experts,
        "K": spec.top_k,
        "BLOCK_K": power_of_2(spec.top_k + spec.num_fused_shared_experts),
        "RENORMALIZE": spec.renormalize,
        "EPSILON": float(spec.renormalize_epsilon),
        "FLOOR": float(spec.renormalize_floor),
        "NORM": float(spec.renormalize_norm),
        "SCALE": float(spec.routed_scaling_factor),
        "SHARED_WEIGHT": float(spec.shared_expert_weight),
    }


def flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A vector that a kernel may address by the element number alone."""
    return None if tensor is None else tensor.reshape(-1).contiguous()
