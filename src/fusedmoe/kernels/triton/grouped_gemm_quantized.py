"""Grouped GEMM of floating-point rows and quantized weights, which become numbers in registers.

Grid (max blocks * tiles of weight rows,), one program per ROWS weight rows of one expert by the
SLOTS slots of one block; order, tables and slots as in ``grouped_gemm``.

a [rows, D], columns dense; w [e, S * N, packed columns], scale and zero point in the canonical
layout of ``QuantizedTensor``; c [R, N] written by slot. DEPTH columns per step, PACKED bytes of a
row. Where two columns share a byte, the columns of even number make one product and those of odd
number another: neither bytes nor rows are interleaved. With A_ORDERED the rows lie so already, even
columns first.

SCALING says where scales go. "end": a row has one for all columns, and its sum is multiplied.
"step": a step has one, and the step's sum is multiplied. "each": groups are shorter than a step,
and the numbers are multiplied, and rounded once.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct, weight_addresses
from fusedmoe.kernels.triton.grouped_gemm import block_of, tile_of
from fusedmoe.kernels.triton.launch import Launcher, follow_previous
from fusedmoe.kernels.triton.lookup import NF4_LIFT
from fusedmoe.kernels.triton.quantized_common import (
    finished,
    float_scale,
    spread_groups,
    store_features,
    tile_rows,
)
from fusedmoe.kernels.triton.quantized_launch import launch_product, precision_of
from fusedmoe.kernels.triton.stored_numbers import load_groups, scaled_numbers, stored_numbers
from fusedmoe.tuning.quantized_tiles import QuantizedTile

# The square root of the factor that e2m1_nibbles_bf16 leaves out: scales and sum take one each.
HALF_EXPONENT = tl.constexpr(2.0**63)


@triton.jit(do_not_specialize=["R"])
def quantized_gemm_kernel(
    a_ptr,
    w_ptr,
    scale_ptr,
    scale2_ptr,
    zero_ptr,
    c_ptr,
    places_ptr,
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
    stride_bias_e,
    stride_bias_n,
    limit,
    alpha,
    beta,
    TOP_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALING: tl.constexpr,
    NATIVE: tl.constexpr,
    A_ORDERED: tl.constexpr,
    C_ORDER: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """N counts features of c. Feature j of shard s is weight row s * shard_step + j * row_step, and
    its scales are row s * scale_shard_step + j // scale_block * scale_row_step."""
    follow_previous(CHAINED)
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    HALVES: tl.constexpr = ELEMENT != "int8" and ELEMENT != "e4m3"
    PACKED: tl.constexpr = DEPTH // 2 if HALVES else DEPTH
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
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
    columns = D // 2 if HALVES else D
    groups = tl.cdiv(D, GROUP)
    at = tl.arange(0, PACKED)
    w_ptrs = w_ptr + expert * stride_we + row.to(tl.int64)[:, None] * stride_wn + at[None, :]
    a_row = a_ptr + (slots // TOP_K * stride_am)[:, None]
    wide = tl.arange(0, DEPTH)
    scale_ptr += expert * stride_se
    if zero_ptr is not None:
        zero_ptr += expert * stride_se

    scale = load_groups(scale_ptr, scale_row, 0, groups, stride_sn, DEPTH, GROUP, EVEN_D)
    zero = None
    if zero_ptr is not None:
        zero = load_groups(zero_ptr, scale_row, 0, groups, stride_sn, DEPTH, GROUP, EVEN_D)
    total = tl.zeros([ROWS, SLOTS], dtype=tl.float32)
    for first in range(0, D, DEPTH):
        first_at = first // 2 if HALVES else first
        if EVEN_D:
            packed = tl.load(w_ptrs + first_at)
        else:
            packed = tl.load(w_ptrs + first_at, (at < columns - first_at)[None, :], 0.0)
        if HALVES and A_ORDERED:
            inside = live[:, None] if EVEN_D else live[:, None] & (at < columns - first_at)[None, :]
            even = tl.load(a_row + (first_at + at)[None, :], inside, 0.0)
            odd = tl.load(a_row + (columns + first_at + at)[None, :], inside, 0.0)
        else:
            inside = live[:, None] if EVEN_D else live[:, None] & (wide < D - first)[None, :]
            even = tl.load(a_row + (first + wide)[None, :], inside, 0.0)
            if HALVES:
                even, odd = tl.split(tl.reshape(even, (SLOTS, PACKED, 2)))
        if SCALING == "each":
            middle = None if zero is None else spread_groups(zero, PACKED)
            low, high = stored_numbers(packed, middle, ELEMENT, DTYPE, NATIVE)
            low, high = scaled_numbers(low, high, scale, ELEMENT, DTYPE, NATIVE)
            total = tl.dot(low, tl.trans(even), total, input_precision=PRECISION)
            if HALVES:
                total = tl.dot(high, tl.trans(odd), total, input_precision=PRECISION)
        else:
            middle = None if zero is None else zero[:, None]
            low, high = stored_numbers(packed, middle, ELEMENT, DTYPE, NATIVE)
            part = total if SCALING == "end" else tl.zeros([ROWS, SLOTS], dtype=tl.float32)
            part = tl.dot(low, tl.trans(even), part, input_precision=PRECISION)
            if HALVES:
                part = tl.dot(high, tl.trans(odd), part, input_precision=PRECISION)
            if SCALING == "end":
                total = part
            else:
                total += part * float_scale(scale)[:, None]
        if SCALING != "end":
            # After the last step the last groups are read again, and not used.
            after = tl.minimum(first + DEPTH, D - DEPTH if EVEN_D else D - 1)
            scale = load_groups(
                scale_ptr, scale_row, after, groups, stride_sn, DEPTH, GROUP, EVEN_D
            )
            if zero_ptr is not None:
                zero = load_groups(
                    zero_ptr, scale_row, after, groups, stride_sn, DEPTH, GROUP, EVEN_D
                )

    if SCALING == "end":
        total *= float_scale(scale)[:, None]
    if ELEMENT == "e2m1" and NATIVE:
        total *= HALF_EXPONENT
    elif ELEMENT == "nf4" and NATIVE:
        total *= 1.0 / NF4_LIFT
    if scale2_ptr is not None:
        shards = 2 if GATED else 1
        total *= tl.load(scale2_ptr + expert * shards + shard)[:, None]
    value = finished(
        total, bias_ptr, expert, row, stride_bias_e, stride_bias_n, limit, alpha, beta, FORMULA,
        GATED,
    )  # fmt: skip
    if places_ptr is not None:
        places_ptr += expert * N
    store_features(value, c_ptr, places_ptr, slots, live, tile, N, stride_cm, C_ORDER)


_launch = Launcher(quantized_gemm_kernel, chained=True)


def scaling_of(element: str, group: int, D: int, tile: QuantizedTile) -> str:
    """Where the scales of groups of ``group`` columns go (SCALING)."""
    if element == "e2m1":
        return "each"  # HALF_EXPONENT goes with the scales
    if group >= D:
        return "end"
    crowded = tile.slots > 64 or (group == tile.depth and tile.slots > 32)
    if element == "nf4":
        crowded = False  # entries of its table are rounded; their products with scales must not be
    return "step" if group % tile.depth == 0 and not crowded else "each"


def launch(
    product: QuantizedProduct,
    a_ordered: bool,
    c_order: str,
    c_places: torch.Tensor | None,
    native: bool,
) -> None:
    """As ``quantized_gemm``, unchecked. ``native``: the GPU has packed bf16 arithmetic and a is
    bf16."""
    a, w, c, _, tile, *_ = product
    D, scale = a.shape[1], w.scale
    assert scale is not None
    element, group = w.format.element, w.format.group.col
    data = w.data
    if native and element == "e4m3":
        data = data.view(torch.uint8)
    group = D if group == -1 else group
    scaling = scaling_of(element, group, D, tile)
    launch_product(
        _launch,
        product,
        (a, data, scale, w.scale2, w.zero_point, c, c_places),
        (a.stride(0), *weight_addresses(w), c.stride(0)),
        (
            element,
            group if scaling != "end" else max(D, tile.depth),
            scaling,
            native,
            a_ordered,
            c_order,
            D % tile.depth == 0,
            precision_of(a),
        ),
    )
