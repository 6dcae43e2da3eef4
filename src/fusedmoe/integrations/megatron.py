"""Megatron's graph-safe MoE function: the batch's size is a number on the device.

``vllm_fused_moe`` and the host functions it consists of, under the names that
``megatron.core.inference.moe.vllm_fused_moe`` gives them. Buffers hold ``max_tokens`` rows, of
which the first ``valid_tokens`` count; nothing is read on the host, so a CUDA graph captured once
serves every number of tokens and every routing.

T = max_tokens, K picks, e experts of this rank, H hidden, I intermediate, R = T * K slots.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.bounded import bounded_experts, bounded_experts_op
from fusedmoe.integrations.megatron_checks import check_hints, check_layer, check_routing
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.bounded_align import BoundedRouting, bounded_align, bounded_ids
from fusedmoe.kernels.bounded_gemm import bounded_gemm
from fusedmoe.kernels.bounded_sum import bounded_sum
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.tuning.tiles import TileConfig

_CONFIG_KEYS = (
    *("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"),
    *("num_warps", "num_stages"),
)


class ActivationType(Enum):
    """What stands between the two GEMMs."""

    SQUARED_RELU = "squared_relu"  # relu(x)^2; fc1 has I rows
    SWIGLU = "swiglu"  # silu(gate) * up; fc1 has I gate rows, then I up rows

    @classmethod
    def of(cls, member: Enum) -> ActivationType:
        """``member``, or where it is one of Megatron's own enumeration, that of the same name.

        Raises ValueError for anything else.
        """
        if isinstance(member, cls):
            return member
        if isinstance(member, Enum) and member.name in cls.__members__:
            return cls[member.name]
        raise ValueError(f"activation_type must be an ActivationType, got {member!r}")

    @property
    def moe_activation(self) -> MoEActivation:
        """The same under this library's name."""
        return MoEActivation.SILU if self is ActivationType.SWIGLU else MoEActivation.RELU2_NO_MUL


def vllm_fused_moe(
    hidden_states: torch.Tensor,
    probs: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc2_weight: torch.Tensor,
    activation_type: ActivationType | Enum,
    num_local_experts: int,
    local_expert_start: int,
    valid_tokens: torch.Tensor,
    routing_map: torch.Tensor,
    out: torch.Tensor | None = None,
    num_tokens_hint: int | None = None,
    *,
    num_experts: int | None = None,
) -> torch.Tensor:
    """out[t] = sum over k of probs[t, k] * expert routing_map[t, k] of hidden_states[t]: [T, H].

    hidden_states bf16 [T, H], fc1_weight bf16 [e, I or 2I, H], fc2_weight bf16 [e, H, I], all of
    any strides; probs float [T, K]; routing_map int32 or int64 [T, K], global ids, -1 for padding.
    This rank has the experts from ``local_expert_start`` on; picks of others count as nothing.

    valid_tokens: one int32 on the device. Rows from there on are neither read nor written.
    ``out`` [T, H] may have any float dtype; None allocates fp32, its rows past the valid tokens
    unwritten. Sums are fp32: the activation's result and each pick's output are rounded to bf16.

    ``num_tokens_hint`` (default T): how many tokens to expect. ``num_experts``: of all ranks,
    where the picks spread over more than the experts here. Both choose tiles and grids alone: any
    value is correct.

    On a CPU the definition runs. Raises ValueError for dtypes other than these and for shapes that
    disagree; on a CPU also for ids below -1 and for valid_tokens outside [0, T], which on a GPU
    count as -1 and as the nearer bound.
    """
    activation_type = ActivationType.of(activation_type)
    check_routing(routing_map, valid_tokens, num_local_experts, local_expert_start)
    tensors = hidden_states, probs, fc1_weight, fc2_weight
    gated = activation_type.moe_activation.is_gated
    check_layer(*tensors, routing_map, out, gated=gated, num_local_experts=num_local_experts)
    check_hints(num_tokens_hint=num_tokens_hint, num_experts=num_experts)
    if out is None:
        out = hidden_states.new_empty(hidden_states.shape, dtype=torch.float32)
    if not hidden_states.is_cuda:
        routing = num_local_experts, local_expert_start, valid_tokens, routing_map
        return vllm_fused_moe_reference(*tensors, activation_type, *routing, out)
    tokens = hidden_states.shape[0] if num_tokens_hint is None else num_tokens_hint
    experts = num_local_experts if num_experts is None else num_experts
    run = bounded_experts_op if torch.compiler.is_compiling() else bounded_experts
    valid, act = valid_tokens.reshape(1), activation_type.moe_activation.value
    layer = hidden_states, fc1_weight, fc2_weight, probs, routing_map
    run(out, *layer, valid, local_expert_start, act, tokens, experts)
    return out


def vllm_fused_moe_reference(
    hidden_states: torch.Tensor,
    probs: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc2_weight: torch.Tensor,
    activation_type: ActivationType,
    num_local_experts: int,
    local_expert_start: int,
    valid_tokens: torch.Tensor,
    routing_map: torch.Tensor,
    out: torch.Tensor | None = None,
    num_tokens_hint: int | None = None,
    *,
    num_experts: int | None = None,
) -> torch.Tensor:
    """The definition, in plain torch, for any float dtype; reads ``valid_tokens`` on the host.

    Nothing is rounded between hidden_states and ``out``. Raises ValueError for valid_tokens outside
    [0, T] and for ids below -1 in valid rows.
    """
    valid, T = int(valid_tokens), hidden_states.shape[0]
    if not 0 <= valid <= T:
        raise ValueError(f"valid_tokens is {valid}, the buffers hold {T} rows")
    ids = routing_map[:valid]
    if valid and int(ids.min()) < -1:
        raise ValueError(f"routing_map holds {int(ids.min())}; -1 stands for padding")
    routing = BoundedRouting(ids, ids.new_tensor([valid]), local_expert_start, num_local_experts)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if out is None:
        out = hidden_states.new_empty(hidden_states.shape, dtype=wide)
    out[:valid] = experts_reference(
        hidden_states[:valid].to(wide),
        fc1_weight,
        fc2_weight,
        probs[:valid],
        bounded_ids(routing).view(ids.shape),
        activation=activation_type.moe_activation,
        compute_dtype=wide,
    )
    return out


def _get_default_config(M: int, E: int, top_k: int) -> dict[str, int]:
    """The field's usual tiles of a 16-bit grouped GEMM for M tokens over E experts.

    A rule of thumb of M alone, for callers of ``_invoke_fused_moe_kernel`` who have no better one;
    ``vllm_fused_moe`` itself asks ``tuning.tiles``, which also looks at widths.
    Raises ValueError where there are no experts.
    """
    if E < 1:
        raise ValueError(f"E must be positive, got {E}")
    low = M <= 64
    return {
        "BLOCK_SIZE_M": 16 if M <= 32 else 32 if M <= 96 else 64 if M <= 512 else 128,
        "BLOCK_SIZE_N": 64 if low else 128,
        "BLOCK_SIZE_K": 128 if low else 64,
        "GROUP_SIZE_M": 16 if M // E > 128 else 1,
        "num_warps": 4 if M <= 128 else 8,
        "num_stages": 4 if M <= 32 else 3,
    }


def _moe_align_block_size_cuda_graphable(
    routing_map: torch.Tensor,
    block_size: int,
    num_local_experts: int,
    local_expert_start: int,
    valid_tokens: torch.Tensor,
) -> MoEAlignment:
    """(sorted_token_ids [P], expert_ids [P / block_size], num_tokens_post_padded [1]), int32.

    routing_map int [T, K], global ids, -1 for padding; valid_tokens one int32 on the device. Blocks
    of ``block_size`` slots (token * K + pick), each of one local expert (counted from 0); padding
    is R, and -1 the expert of blocks not in use. Slots of other ranks' experts and of rows past
    valid_tokens are in no block. P follows from shapes alone. Slots of one expert are in ascending
    order. Raises ValueError for a bad block size, too many slots, other dtypes or shapes.
    """
    check_routing(routing_map, valid_tokens, num_local_experts, local_expert_start)
    routing = _routing(routing_map, valid_tokens, local_expert_start, num_local_experts)
    return bounded_align(routing, block_size)


def _invoke_fused_moe_kernel(
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    topk_weights: torch.Tensor | None,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
    mul_routed_weight: bool,
    top_k: int,
    config: dict[str, Any],
    grid_size: int,
    fuse_squared_relu: bool = False,
) -> None:
    """C[slot] = A[slot // top_k] @ B[expert].T for every slot of the table; other rows stay.

    A [rows, D], B [e, N, D], C [R, N] (or [T, K, N]) with R <= rows * top_k; the table as
    ``_moe_align_block_size_cuda_graphable`` makes it for ``config["BLOCK_SIZE_M"]``. Squared ReLU,
    then topk_weights [R] (or [T, K]) if ``mul_routed_weight``, are applied to the fp32 sum.
    ``grid_size``: how many programs share the tiles, any positive number.

    ``config`` has the keys of ``_get_default_config``. Raises ValueError where shapes or dtypes
    disagree, or ``config`` lacks a key.
    """
    if C.dim() < 2:
        raise ValueError(f"C must be [R, N] or [T, K, N], got {tuple(C.shape)}")
    try:
        slots = C.view(math.prod(C.shape[:-1]), C.shape[-1])
    except RuntimeError:
        shape, strides = tuple(C.shape), C.stride()
        raise ValueError(f"C's slots must lie evenly, {shape} has strides {strides}") from None
    weights = None
    if mul_routed_weight:
        if topk_weights is None:
            raise ValueError("mul_routed_weight needs topk_weights")
        weights = topk_weights.reshape(-1)
    bounded_gemm(
        A,
        B,
        slots,
        MoEAlignment(sorted_token_ids, expert_ids, num_tokens_post_padded),
        _tile_config(config),
        top_k=top_k,
        programs=grid_size,
        row_weights=weights,
        activation=MoEActivation.RELU2_NO_MUL if fuse_squared_relu else None,
    )


def _moe_sum(
    input: torch.Tensor,
    topk_weights: torch.Tensor,
    max_tokens: int,
    topk: int,
    K: int,
    valid_tokens: torch.Tensor,
    routing_map: torch.Tensor,
    local_expert_start: int,
    num_local_experts: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = sum over k of topk_weights[t, k] * input[t * topk + k]: [max_tokens, K].

    input [max_tokens * topk, K] (K is the hidden size here), topk_weights [max_tokens, topk]. fp32
    sums, rounded once to ``out``'s dtype (None: a new fp32 tensor). Slots of other ranks' experts
    are not read, rows past valid_tokens not written. Raises ValueError where shapes disagree, and
    for an ``out`` of integers.
    """
    check_routing(routing_map, valid_tokens, num_local_experts, local_expert_start)
    if input.shape != (max_tokens * topk, K):
        raise ValueError(
            f"input is {tuple(input.shape)}, max_tokens {max_tokens}, topk {topk} and K {K} ask "
            f"for {(max_tokens * topk, K)}"
        )
    if out is None:
        out = input.new_empty(max_tokens, K, dtype=torch.float32)
    if not out.is_floating_point():
        raise ValueError(f"out must be of a float dtype, got {out.dtype}")
    routing = _routing(routing_map, valid_tokens, local_expert_start, num_local_experts)
    return bounded_sum(input, topk_weights, routing, out)


def _tile_config(config: dict[str, Any]) -> TileConfig:
    if missing := [key for key in _CONFIG_KEYS if key not in config]:
        raise ValueError(f"config lacks {', '.join(missing)}")
    block_m, block_n, block_k, group_m, num_warps, num_stages = (
        int(config[key]) for key in _CONFIG_KEYS
    )
    return TileConfig(block_m, block_n, block_k, group_m, num_warps, num_stages)


def _routing(
    routing_map: torch.Tensor, valid_tokens: torch.Tensor, first_expert: int, num_local: int
) -> BoundedRouting:
    return BoundedRouting(
        routing_map.contiguous(), valid_tokens.reshape(1), first_expert, num_local
    )
