"""How experts run on the grouped fp8 GEMMs of the deep_gemm package.

    Standard   rows by expert, each expert's padded to whole tiles -> GEMM1 -> activation
               -> fp8 again -> GEMM2 -> weighted sum over K
    Batched    the same on [e, M, H] with a count per expert, without the rows' way there and back

What the package takes (version 2): rows e4m3 with fp32 scales per 128 columns, whose memory runs
along the rows and starts each column at 16 bytes; weights e4m3 with fp32 scales per 128 x 128; bf16
out. Rows of one expert are contiguous and start at multiples of an alignment; an int32 per row
names its expert, -1 for rows that carry nothing, which are not written.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2 where gated.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, apply_moe_activation
from fusedmoe.experts.opaque import opaque
from fusedmoe.kernels.align import align_local_slots, padded_slots
from fusedmoe.kernels.permute import moe_unpermute
from fusedmoe.kernels.quantize import quantize_rows
from fusedmoe.modular_kernel.records import ExpertsWork, scratch
from fusedmoe.quantization.keys import FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0

PACKAGE = "deep_gemm"
BLOCK = 128
# One function, renamed within version 2.
_MASKED = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked")
_NEEDED = (
    ("m_grouped_fp8_gemm_nt_contiguous",),
    _MASKED,
    ("get_mk_alignment_for_contiguous_layout",),
)
_TMA_ROWS = 16 // torch.float32.itemsize


def package() -> Any:
    """deep_gemm; ImportError where it is absent or lacks what is called here."""
    try:
        module = import_module(PACKAGE)
    except ImportError as error:
        raise ImportError(
            f"these experts need the package {PACKAGE}, version 2 or later"
        ) from error
    missing = [names[0] for names in _NEEDED if not any(hasattr(module, n) for n in names)]
    if missing:
        raise ImportError(
            f"these experts need the package {PACKAGE}, version 2 or later; the one that is "
            f"installed lacks {', '.join(missing)}"
        )
    return module


@dataclass(frozen=True)
class BlockWeights:
    """w1 [e, S * I, H] and w2 [e, H, I] in e4m3, with fp32 scales per 128 x 128.

    ``e8m0``: scales of weights and rows are powers of two. Raises ValueError for other layouts.
    """

    w1: torch.Tensor
    w1_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    e8m0: bool = False

    def __post_init__(self) -> None:
        for name in ("w1", "w2"):
            data, scale = getattr(self, name), getattr(self, f"{name}_scale")
            if data.dtype != torch.float8_e4m3fn or data.dim() != 3 or not data.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous e4m3 [e, N, K], got {data.dtype} "
                    f"{tuple(data.shape)} with strides {data.stride()}"
                )
            e, N, K = data.shape
            if N % BLOCK or K % BLOCK:
                raise ValueError(f"{name} {tuple(data.shape)} is not made of blocks of {BLOCK}")
            wanted = (e, N // BLOCK, K // BLOCK)
            if scale.shape != wanted or scale.dtype != torch.float32 or not scale.is_contiguous():
                raise ValueError(
                    f"{name}_scale must be contiguous fp32 {wanted}, got {scale.dtype} "
                    f"{tuple(scale.shape)} with strides {scale.stride()}"
                )

    def options(self) -> dict[str, bool]:
        """Whether the package may read fp32 scales as exponents: where they are nothing else."""
        return {"disable_ue8m0_cast": not self.e8m0}

    def quantized(
        self, x: torch.Tensor, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., D] in e4m3, contiguous, with scales fp32 [..., D / 128]; both as they are where
        ``scale`` says that they are quantized."""
        wanted = (*x.shape[:-1], x.shape[-1] // BLOCK)
        if scale is None:
            key = FP8_DYNAMIC_128_UE8M0 if self.e8m0 else FP8_DYNAMIC_128
            q, found = quantize_rows(x.reshape(-1, x.shape[-1]).contiguous(), key)
            return q.view(x.shape), found.view(wanted)
        if x.dtype != torch.float8_e4m3fn or scale.shape != wanted or scale.dtype != torch.float32:
            raise ValueError(
                f"quantized rows are e4m3 with fp32 scales {wanted}, got {x.dtype} with "
                f"{scale.dtype} {tuple(scale.shape)}"
            )
        return x.contiguous(), scale


def mn_major(scale: torch.Tensor) -> torch.Tensor:
    """Scales [..., n, groups], each group's n side by side from a multiple of 16 bytes on.

    As they are where they lie like that already.
    """
    *lead, n, groups = scale.shape
    room = -(-n // _TMA_ROWS) * _TMA_ROWS
    made = scale.new_empty(*lead, groups, room).transpose(-1, -2)[..., :n, :]
    return scale if scale.stride() == made.stride() else made.copy_(scale)


class AlignedRows(NamedTuple):
    """Slots by expert, every expert's from a multiple of the alignment on; P rows.

    token int64 [P]: where each row comes from, any token for rows that carry nothing; expert int32
    [P]: its local expert, -1 for those; inverse int32 [R]: the row of each slot, P for slots of no
    local expert.
    """

    token: torch.Tensor
    expert: torch.Tensor
    inverse: torch.Tensor


def aligned_size(R: int, e: int, alignment: int) -> int:
    """P, the most rows that R slots of e experts take: known without reading ids."""
    return padded_slots(R, alignment, e, True)


def aligned_rows(
    topk_ids: torch.Tensor, e: int, expert_map: torch.Tensor | None, alignment: int
) -> AlignedRows:
    """topk_ids int [T, K] -> the rows; ids that name no local expert have none."""
    R, K = topk_ids.numel(), topk_ids.shape[1]
    slots, experts, _ = align_local_slots(topk_ids, alignment, e, expert_map, whole_blocks=True)
    P = slots.shape[0]
    expert = experts.repeat_interleave(alignment, output_size=experts.shape[0] * alignment)[:P]
    expert = torch.where(slots < R, expert, -1)
    row = torch.arange(P, dtype=torch.int32, device=slots.device)
    # One entry past the slots takes the rows that carry nothing.
    inverse = torch.full((R + 1,), P, dtype=torch.int32, device=slots.device)
    inverse.scatter_(0, torch.where(expert >= 0, slots, R).long(), row)
    return AlignedRows(slots.clamp(max=R - 1).long() // K, expert, inverse[:R])


def _gathered(q: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """q[token], by bytes: not every backend indexes fp8."""
    return q.view(torch.uint8)[token].view(q.dtype)


@opaque("fusedmoe::deep_gemm_experts", ("output", "workspace13", "workspace2"))
def standard_experts(
    work: ExpertsWork,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    e8m0: bool,
    activation_config: ApplyMoEActivationConfig,
) -> None:
    """Write the weighted sum over K, bf16 [T, H], into ``work.output``.

    Rows are bf16 [T, H], or e4m3 with scales fp32 [T, H / 128]; weights as ``BlockWeights``. With P
    rows after alignment, the workspaces hold P * max(S * I, H) and P * I elements of bf16.
    """
    gemm, weights = package(), BlockWeights(work.w1, w1_scale, work.w2, w2_scale, e8m0)
    (e, N, _), (_, H, width), R = work.w1.shape, work.w2.shape, work.topk_ids.numel()
    if R == 0:
        work.output.zero_()
        return
    alignment = int(gemm.get_mk_alignment_for_contiguous_layout())
    rows = aligned_rows(work.topk_ids, e, work.expert_map, alignment)
    P = rows.token.shape[0]
    q, q_scale = weights.quantized(work.hidden_states, work.a1q_scale)
    first = scratch(work.workspace13, P, N)
    gemm.m_grouped_fp8_gemm_nt_contiguous(
        (_gathered(q, rows.token), mn_major(q_scale[rows.token])),
        (weights.w1, weights.w1_scale),
        first,
        rows.expert,
        **weights.options(),
    )
    act, ids = scratch(work.workspace2, P, width), rows.expert[:, None]
    apply_moe_activation(
        work.activation, act, first, activation_config=activation_config, topk_ids=ids
    )
    q, q_scale = weights.quantized(act)
    second = scratch(work.workspace13, P, H)
    gemm.m_grouped_fp8_gemm_nt_contiguous(
        (q, mn_major(q_scale)),
        (weights.w2, weights.w2_scale),
        second,
        rows.expert,
        **weights.options(),
    )
    moe_unpermute(work.output, second, work.output_weights_or_ones, rows.inverse)


@opaque("fusedmoe::batched_deep_gemm_experts", ("output", "workspace13", "workspace2"))
def batched_experts(
    work: ExpertsWork,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    e8m0: bool,
    counts: torch.Tensor,
    expected_rows: int,
    activation_config: ApplyMoEActivationConfig,
) -> None:
    """Write ``work.output`` bf16 [e, M, H], row by row, up to each expert's count, int32 [e].

    Rows are bf16 [e, M, H], or e4m3 with scales fp32 [e, M, H / 128]; weights as ``BlockWeights``.
    The workspaces hold e * M * S * I and e * M * I elements of bf16. ``expected_rows`` of an
    expert: a hint.
    """
    module, weights = package(), BlockWeights(work.w1, w1_scale, work.w2, w2_scale, e8m0)
    masked_gemm = next(getattr(module, name) for name in _MASKED if hasattr(module, name))
    (e, M, _), N, width = work.hidden_states.shape, work.w1.shape[1], work.w2.shape[2]
    if M == 0:
        return
    counts = counts.to(torch.int32)
    q, q_scale = weights.quantized(work.hidden_states, work.a1q_scale)
    first = scratch(work.workspace13, e * M, N).view(e, M, N)
    masked_gemm(
        (q, mn_major(q_scale)),
        (weights.w1, weights.w1_scale),
        first,
        counts,
        expected_rows,
        **weights.options(),
    )
    act = scratch(work.workspace2, e * M, width).view(e, M, width)
    apply_moe_activation(
        work.activation,
        act,
        first,
        activation_config=activation_config,
        valid_token_counts=counts,
    )
    q, q_scale = weights.quantized(act)
    masked_gemm(
        (q, mn_major(q_scale)),
        (weights.w2, weights.w2_scale),
        work.output,
        counts,
        expected_rows,
        **weights.options(),
    )
