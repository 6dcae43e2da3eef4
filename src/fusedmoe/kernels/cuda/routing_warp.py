"""Launching ``routing_warp.cu``: which rules it has, constants and arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from fusedmoe.kernels.cuda.program import CudaKernel, source_of
from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCORES = {"softmax": 0, "sigmoid": 1}
# A lane's registers hold 1/32 of the experts; with more picks, candidates might outnumber lanes.
MOST_EXPERTS, MOST_PICKS = 512, 16
MOST_PROGRAMS = 4096  # starting a program takes about as long as routing its token
SHARED_BYTES = 64 * 8


class Arguments(ctypes.Structure):
    """The kernel's one parameter, field by field as the source has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "bias", "scale", "padding")),
        *((name, ctypes.c_void_p) for name in ("weights", "ids")),
        *((name, ctypes.c_int64) for name in ("stride_row", "stride_expert", "stride_padding")),
        ("T", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("epsilon", "floor", "factor")),
    )


def has_rule(spec: RoutingSpec) -> bool:
    """Whether the kernel has the rule: the best of all experts, by softmax or sigmoid."""
    grouped = spec.num_expert_group > 1 and spec.topk_group < spec.num_expert_group
    more = spec.num_zero_experts, spec.num_fused_shared_experts, spec.logit_softcap
    return (
        spec.selection == "topk"
        and spec.score_function in SCORES
        and not grouped
        and not any(more)
        and spec.renormalize_norm == 1.0
        and spec.num_experts <= MOST_EXPERTS
        and spec.top_k <= MOST_PICKS
    )


def _kernel(defines: dict[str, int]) -> CudaKernel:
    text = tuple((name, str(value)) for name, value in defines.items())
    source = source_of("instructions.cuh", "routing_warp.cu")
    return CudaKernel(source, "routing_warp", text, 32, SHARED_BYTES)


@lru_cache(maxsize=256)
def _kernel_of(
    spec: RoutingSpec,
    logits: torch.dtype,
    bias: torch.dtype | None,
    scale: torch.dtype | None,
    ids: torch.dtype,
    padding: bool,
) -> CudaKernel | None:
    """The kernel for tensors of these dtypes; None where there is none."""
    if not has_rule(spec) or not {logits, bias, scale} <= {None, *ELEMENTS}:
        return None
    return _kernel(
        {
            "EXPERTS": spec.num_experts,
            "K": spec.top_k,
            "ELEMENT": ELEMENTS[logits],
            "SCORE": SCORES[spec.score_function],
            "AFTER_TOPK": int(spec.score_after_topk),
            "BIAS": -1 if bias is None else ELEMENTS[bias],
            "EXPERT_SCALE": -1 if scale is None else ELEMENTS[scale],
            "PADDING": int(padding),
            "RENORMALIZE": int(spec.renormalize),
            "ID64": int(ids == torch.int64),
        }
    )


def routing_warp(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors,
    *,
    is_padding: torch.Tensor | None = None,
    indices_dtype: torch.dtype = torch.int32,
) -> RoutingResult | None:
    """As ``routing_reference``, whose arguments the caller has checked; None where the kernel does
    not have the rule, or does not read what it wants."""
    if tensors.hash_indices_table is not None or tensors.vision_bias is not None:
        return None
    vectors = tensors.correction_bias, tensors.per_expert_scale
    dtypes = (None if one is None else one.dtype for one in vectors)
    kernel = _kernel_of(spec, logits.dtype, *dtypes, indices_dtype, is_padding is not None)
    if kernel is None:
        return None
    T, K = logits.shape[0], spec.top_k
    weights = torch.empty((T, K), dtype=torch.float32, device=logits.device)
    ids = torch.empty((T, K), dtype=indices_dtype, device=logits.device)
    if T == 0:
        return RoutingResult(weights, ids)
    bias, scale = (None if one is None else one.reshape(-1).contiguous() for one in vectors)
    arguments = Arguments(
        logits.data_ptr(),
        *(None if one is None else one.data_ptr() for one in (bias, scale, is_padding)),
        weights.data_ptr(),
        ids.data_ptr(),
        *logits.stride(),
        0 if is_padding is None else is_padding.stride(0),
        T,
        spec.renormalize_epsilon,
        spec.renormalize_floor,
        spec.routed_scaling_factor,
    )
    kernel.launch(min(MOST_PROGRAMS, T), arguments, logits.get_device())
    return RoutingResult(weights, ids)
