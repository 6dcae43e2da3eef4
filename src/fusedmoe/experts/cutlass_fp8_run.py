"""How fp8 experts run on torch's grouped scaled GEMM, which is CUTLASS's.

    Standard   rows by expert -> GEMM1 -> activation -> fp8 again -> GEMM2 -> weighted sum over K
    Batched    the same on [e, M, H], every row up to M multiplied

``torch.nn.functional.scaled_grouped_mm`` with a scale per row of either operand: rows e4m3 [n, K]
with fp32 [n] and int32 ends of the experts' rows, or [e, M, K] with fp32 [e, M]; weights e4m3, seen
as [e, K, N] with K contiguous, with fp32 [e, N]; bf16 out. One scale for a tensor is one that all
its rows repeat.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2 where gated.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, apply_moe_activation
from fusedmoe.experts.opaque import opaque
from fusedmoe.kernels.permute import moe_permute, moe_unpermute
from fusedmoe.kernels.quantize import quantize_rows
from fusedmoe.modular_kernel.records import ExpertsWork, scratch
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    QuantKey,
)

STRIDE_BYTES = 16
FUNCTION = "scaled_grouped_mm"
_functional: Any = torch.nn.functional  # whose type stubs lack the function


def scaled_gemm(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [n, K] with ends int32 [e], or q [e, M, K] -> bf16 [..., N]; w [e, N, K].

    Rows past the last end are not written. Sums are fp32 without the tensor cores' short cut.
    """
    recipe = _functional.ScalingType.RowWise
    return _functional.scaled_grouped_mm(
        q,
        w.transpose(-2, -1),
        scale,
        recipe,
        w_scale,
        recipe,
        offs=ends,
        output_dtype=torch.bfloat16,
        use_fast_accum=False,
    )


def row_scales(scale: torch.Tensor, e: int, N: int, *, interleaved: bool = False) -> torch.Tensor:
    """A weight's scales, per row [e, N, 1] or per tensor and shard [e, S], as fp32 [e, N].

    ``interleaved``: rows of the shards alternate. Raises ValueError for other shapes.
    """
    if scale.shape == (e, N, 1):
        return scale.reshape(e, N).float().contiguous()
    if scale.dim() not in (1, 2) or scale.shape[0] != e or N % max(1, scale[0].numel()):
        raise ValueError(
            f"scales of {e} experts with {N} rows are [{e}, {N}, 1] or [{e}, shards], got "
            f"{tuple(scale.shape)}"
        )
    by_shard = scale.reshape(e, -1).float()
    times = N // by_shard.shape[1]
    if interleaved:
        return by_shard.repeat(1, times)
    return by_shard.repeat_interleave(times, dim=1)


def rows_key(per_token: bool, scale: torch.Tensor | None) -> QuantKey:
    """How rows are quantized: each by itself, by the scale that is given, or all by one found."""
    if per_token:
        return FP8_DYNAMIC_TOKEN
    return FP8_DYNAMIC_TENSOR if scale is None else FP8_STATIC_TENSOR


def _by_row(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, 1], [1] or [] -> fp32 [rows, 1], contiguous."""
    if scale.numel() not in (1, rows):
        raise ValueError(f"{rows} rows have one scale each or one in all, got {scale.numel()}")
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def _quantized(
    x: torch.Tensor,
    per_token: bool,
    given: torch.Tensor | None,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, D] -> e4m3 [n, D], fp32 [n, 1]; rows whose id is -1 do not count for a common scale."""
    q, scale = quantize_rows(x.contiguous(), rows_key(per_token, given), given, topk_ids=ids)
    return q, _by_row(scale, x.shape[0])


@opaque("fusedmoe::cutlass_fp8_experts", ("output", "workspace13", "workspace2"))
def standard(
    work: ExpertsWork,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    per_token: bool,
    a1_given: torch.Tensor | None,
    a2_given: torch.Tensor | None,
    activation_config: ApplyMoEActivationConfig,
) -> None:
    """Write the weighted sum over K, bf16 [T, H], into ``work.output``.

    Rows are bf16 [T, H], or e4m3 with scales fp32 [T, 1] or one number; w*_scale fp32 [e, N];
    a*_given fp32 [1] scale the rows that enter each product, None: scales are found. The workspaces
    hold R * H bytes and R * I elements of bf16.
    """
    x, expert_map = work.hidden_states, work.expert_map
    (T, H), R, (e, _, width) = x.shape, work.topk_ids.numel(), work.w2.shape
    if R == 0:
        work.output.zero_()
        return
    if work.a1q_scale is None:
        q, by_row = _quantized(x, per_token, a1_given)
    else:
        q, by_row = x.contiguous(), _by_row(work.a1q_scale, T)
    assert work.workspace13 is not None
    rows, row_scale, offsets, inverse, _ = moe_permute(
        q.view(torch.uint8),
        by_row,
        work.topk_ids,
        e if expert_map is None else expert_map.shape[0],
        e,
        expert_map,
        permuted_hidden_states=scratch(work.workspace13.flatten().view(torch.uint8), R, H),
    )
    assert row_scale is not None
    ends = offsets[1:].to(torch.int32)
    first = scaled_gemm(rows.view(q.dtype), row_scale.flatten(), work.w1, w1_scale, ends)
    act = scratch(work.workspace2, R, width)
    row = torch.arange(R, device=ends.device)
    live = torch.where(row < offsets[-1], 0, -1)[:, None]
    apply_moe_activation(
        work.activation, act, first, activation_config=activation_config, topk_ids=live
    )
    q, by_row = _quantized(act, per_token, a2_given, None if per_token else live)
    second = scaled_gemm(q, by_row.flatten(), work.w2, w2_scale, ends)
    moe_unpermute(work.output, second, work.output_weights_or_ones, inverse, offsets)


@opaque("fusedmoe::batched_cutlass_fp8_experts", ("output", "workspace2"))
def batched(
    work: ExpertsWork,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    per_token: bool,
    a1_given: torch.Tensor | None,
    a2_given: torch.Tensor | None,
    counts: torch.Tensor,
    activation_config: ApplyMoEActivationConfig,
) -> None:
    """Write ``work.output`` bf16 [e, M, H] up to each expert's count, int32 [e]; what follows is
    unset.

    Rows are bf16 [e, M, H], or e4m3 with scales fp32 [e, M, 1] or one number. The second workspace
    holds e * M * I elements of bf16. Scales are as in ``standard``.
    """
    x, (_, H, width) = work.hidden_states, work.w2.shape
    e, M, _ = x.shape
    if M == 0:
        return
    if work.a1q_scale is None:
        q, by_row = _quantized(x.reshape(e * M, H), per_token, a1_given)
    else:
        q, by_row = x.contiguous(), _by_row(work.a1q_scale, e * M)
    first = scaled_gemm(q.view(e, M, H), by_row.view(e, M), work.w1, w1_scale)
    act = scratch(work.workspace2, e * M, width).view(e, M, width)
    apply_moe_activation(
        work.activation,
        act,
        first,
        activation_config=activation_config,
        valid_token_counts=counts.to(torch.int32),
    )
    q, by_row = _quantized(act.view(e * M, width), per_token, a2_given)
    work.output.copy_(scaled_gemm(q.view(e, M, width), by_row.view(e, M), work.w2, w2_scale))
