"""Grouped GEMM of 8-bit rows and 8-bit weights, fp8 or int8, whose scales multiply sums in fp32.

Grid, tables and tiles as in ``grouped_gemm_quantized``: ROWS weight rows by SLOTS slots, DEPTH
columns per step.

a [rows, D]: e4m3 or int8 with a_scale [rows, groups] (strides 0 where it is shared), or 16-bit
rows that are quantized on the way in, DEPTH columns to a group (a_scale None). w [e, S * N, D] and
its scales in the canonical layout. c [R, N] written by slot; where c_scale [R, N / 128] is given c
is e4m3, quantized by groups of 128 features.

STEPPED: scales change along the columns, so each step's products are summed by themselves and
added to the total in fp32. That is also what keeps fp8 sums exact: the tensor cores hold 14 bits.
Otherwise one sum runs through in the tensor cores: exact for int8, in their 14 bits for fp8.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct, weight_addresses
from fusedmoe.kernels.triton.grouped_gemm import block_of, tile_of
from fusedmoe.kernels.triton.launch import Launcher, follow_previous
from fusedmoe.kernels.triton.quantize import quantized, scale_of
from fusedmoe.kernels.triton.quantized_common import (
    finished,
    float_scale,
    store_features,
    tile_rows,
)
from fusedmoe.kernels.triton.quantized_launch import launch_product


@triton.jit
def _store_quantized(
    value, c_ptr, c_scale_ptr, slots, live, tile, N, stride_cm, stride_cs, E8M0: tl.constexpr
):
    """Features [WIDTH, SLOTS] as e4m3 with a scale per slot; WIDTH is the group."""
    WIDTH: tl.constexpr = value.shape[0]
    feature = tile * WIDTH + tl.arange(0, WIDTH)
    inside = feature < N
    value = tl.where(inside[:, None], value, 0.0)
    scale = scale_of(value, 0, c_ptr.dtype.element_ty, E8M0)
    stored = quantized(value, scale[None, :], c_ptr.dtype.element_ty)
    tl.store(c_scale_ptr + slots * stride_cs + tile, scale, live)
    c_ptrs = c_ptr + (slots * stride_cm)[None, :] + feature[:, None]
    tl.store(c_ptrs, stored, live[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["R"])
def w8a8_gemm_kernel(
    a_ptr,
    w_ptr,
    a_scale_ptr,
    scale_ptr,
    c_ptr,
    c_scale_ptr,
    bias_ptr,
    sorted_ptr,
    experts_ptr,
    num_post_ptr,
    map_ptr,
    num_mapped,
    R,
    e,
    N,
    D,
    stride_am,
    stride_as,
    stride_ag,
    stride_we,
    stride_wn,
    shard_step,
    row_step,
    stride_se,
    stride_sn,
    scale_shard_step,
    scale_row_step,
    scale_block,
    stride_cm,
    stride_cs,
    stride_bias_e,
    stride_bias_n,
    limit,
    alpha,
    beta,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    A_GROUP: tl.constexpr,
    STEPPED: tl.constexpr,
    E8M0: tl.constexpr,
    EVEN_D: tl.constexpr,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Rows and scales are found as in ``quantized_gemm_kernel``; GROUP and A_GROUP count columns
    that share a scale (0: all of them)."""
    follow_previous(CHAINED)
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
    WHOLE: tl.constexpr = w_ptr.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if WHOLE else tl.float32
    # After so many columns fp8 sums are added up in fp32: tensor cores cut bits of longer ones off.
    IMPRECISE: tl.constexpr = None if WHOLE else 128
    num_m = R if sorted_ptr is None else tl.load(num_post_ptr) // SLOTS
    if tl.program_id(0) >= num_m * tl.cdiv(N, WIDTH):
        return
    tile_m, tile = tile_of(num_m, N, WIDTH, GROUP_M)
    expert, slots, live = block_of(
        tile_m, sorted_ptr, experts_ptr, map_ptr, num_mapped, R, e, SLOTS
    )
    if expert < 0:
        return
    shard, feature = tile_rows(tile, N, ROWS, GATED)
    row = shard * shard_step + feature * row_step
    scale_row = shard * scale_shard_step + feature // scale_block * scale_row_step
    at = tl.arange(0, DEPTH)
    w_ptrs = w_ptr + expert * stride_we + row.to(tl.int64)[:, None] * stride_wn + at[None, :]
    a_rows = tl.where(live, slots // TOP_K, 0)
    a_ptrs = a_ptr + (a_rows * stride_am)[:, None] + at[None, :]
    scale_ptrs = scale_ptr + expert * stride_se + scale_row * stride_sn
    if a_scale_ptr is not None:
        a_scale_ptrs = a_scale_ptr + a_rows * stride_as

    w_scale = tl.load(scale_ptrs)
    if a_scale_ptr is not None:
        a_scale = tl.load(a_scale_ptrs)
    total = tl.zeros([ROWS, SLOTS], dtype=tl.float32 if STEPPED else SUM)
    for first in range(0, D, DEPTH):
        if EVEN_D:
            w = tl.load(w_ptrs + first)
            a = tl.load(a_ptrs + first, live[:, None], 0.0)
        else:
            inside = (at < D - first)[None, :]
            w = tl.load(w_ptrs + first, inside, 0.0)
            a = tl.load(a_ptrs + first, live[:, None] & inside, 0.0)
        if a_scale_ptr is None:
            a = a.to(tl.float32)
            a_scale = scale_of(a, 1, w_ptr.dtype.element_ty, E8M0)
            a = quantized(a, a_scale[:, None], w_ptr.dtype.element_ty)
        if STEPPED:
            part = tl.dot(w, tl.trans(a), out_dtype=SUM)
            total += part.to(tl.float32) * (float_scale(w_scale)[:, None] * a_scale[None, :])
            after = tl.minimum(first + DEPTH, D - 1)
            if GROUP != 0:
                w_scale = tl.load(scale_ptrs + after // GROUP)
            if a_scale_ptr is not None and A_GROUP != 0:
                a_scale = tl.load(a_scale_ptrs + after // A_GROUP * stride_ag)
        else:
            total = tl.dot(w, tl.trans(a), total, max_num_imprecise_acc=IMPRECISE, out_dtype=SUM)

    if not STEPPED:
        total = total.to(tl.float32) * (float_scale(w_scale)[:, None] * a_scale[None, :])
    value = finished(
        total, bias_ptr, expert, row, stride_bias_e, stride_bias_n, limit, alpha, beta, FORMULA,
        GATED,
    )  # fmt: skip
    if c_scale_ptr is None:
        store_features(value, c_ptr, None, slots, live, tile, N, stride_cm, "")
    else:
        _store_quantized(
            value, c_ptr, c_scale_ptr, slots, live, tile, N, stride_cm, stride_cs, E8M0
        )


_launch = Launcher(w8a8_gemm_kernel, chained=True)


def launch(
    product: QuantizedProduct,
    a_scale: torch.Tensor | None,
    c_scale: torch.Tensor | None,
    a_group: int,
    e8m0: bool,
) -> None:
    """As ``w8a8_gemm``, unchecked."""
    a, w, c, _, tile, *_ = product
    scale, group = w.scale, max(0, w.format.group.col)
    assert scale is not None
    a_strides = (0, 0)
    if a_scale is not None and a_scale.numel() > 1:
        a_strides = (a_scale.stride(0), a_scale.stride(1))
    c_scale_stride = 0 if c_scale is None else c_scale.stride(0)
    stepped = bool(group or a_group or a_scale is None)
    launch_product(
        _launch,
        product,
        (a, w.data, a_scale, scale, c, c_scale),
        (a.stride(0), *a_strides, *weight_addresses(w), c.stride(0), c_scale_stride),
        (group, max(0, a_group), stepped, e8m0, a.shape[1] % tile.depth == 0),
    )
