"""Routing in one launch: scores, bias, groups, top-k, renormalization, scales, empty slots.

Grid min(cdiv(T, BLOCK_T), MOST_PROGRAMS): a program owns BLOCK_T tokens at a time, with all their
candidates. The rule itself is ``route_rows`` (``routing_rows.py``).

logits [T, E + Z] of any float dtype and strides; bias, vision_bias fp [E + Z]; scale fp [E];
table int [vocab, K]; input_ids int [T]; is_padding bool [T]; each of them may be None.
-> weights fp32 [T, K + N], ids int [T, K + N], zero_weight fp32 [T] or None, all contiguous.

Phi-MoE's sparsemixer is a kernel of its own (``sparsemixer.py``), with the same last steps.

Invariants: fp32 arithmetic; other rows and their number change no bit of a row.
"""

from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import Launcher, follow_previous
from fusedmoe.kernels.triton.routing_rows import route_rows
from fusedmoe.kernels.triton.routing_steps import RoutingCase, finish_rows
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
    CASE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    BLOCK_T: tl.constexpr = CASE.BLOCK_T
    follow_previous(CHAINED)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        rows = block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        row_mask = rows < num_tokens
        weights, ids = route_rows(
            logits_ptr, bias_ptr, vision_bias_ptr, table_ptr, input_ids_ptr, rows, row_mask,
            stride_row, stride_expert, stride_input_id, num_table_rows, stride_table_row,
            stride_table_slot, CASE,
        )  # fmt: skip
        finish_rows(
            weights, ids, scale_ptr, padding_ptr, weights_ptr, ids_ptr, zero_weight_ptr, rows,
            row_mask, stride_padding, CASE,
        )  # fmt: skip


TOKENS_PER_PROGRAM = 1
MOST_PROGRAMS = 4096  # starting a program takes about as long as routing its token


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
    num_tokens = logits.shape[0]
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
    case, num_warps = routing_case(spec, vision_bias is not None, TOKENS_PER_PROGRAM)
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
        (case,),
        num_warps,
    )
    return result


@lru_cache(maxsize=256)
def routing_case(spec: RoutingSpec, vision: bool, block_t: int) -> tuple[RoutingCase, int]:
    """The case of a rule and its warps; a float that was given as an integer becomes one."""
    floats: dict[str, Any] = {
        field.name: float(getattr(spec, field.name))
        for field in fields(spec)
        if isinstance(field.default, float)
    }
    case = RoutingCase(replace(spec, **floats), vision, block_t)
    return case, routing_warps(case.BLOCK_G * case.BLOCK_S)


_launch = Launcher(routing_kernel, chained=True)


def flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A vector that a kernel may address by the element number alone."""
    return None if tensor is None else tensor.reshape(-1).contiguous()
