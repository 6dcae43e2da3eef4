"""Rows of activations rounded to a format and multiplied back, in one pass over each.

Grid (rows,). x [rows, D] of any strides -> out [rows, D] dense, in the dtype of x. A row is read
twice where its largest magnitude matters (from the cache the second time).

ELEMENT says what numbers are rounded to; GROUP columns share a scale (0: the whole row, or what
``given_ptr`` holds); what the scale is follows from both:

    e4m3, int8         the largest magnitude over 448, 127; E8M0 rounds it up to a power of two
    e2m1, e3m2, e2m3   a power of two, such that the largest magnitude has the largest exponent
    e2m1, groups of 16 e4m3 times a second scale, which is the row's, or given (NVFP4)
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import Launcher, power_of_2, stand_between
from fusedmoe.kernels.triton.quantize import LEAST, LEAST_OF_ROW, largest_magnitude, scale_from
from fusedmoe.kernels.triton.quantized_common import float_scale, place_of

NVFP4_GROUP = tl.constexpr(16)
MOST_FP16 = tl.constexpr(65504.0)


@triton.jit
def _nearest(ratio, ELEMENT: tl.constexpr):
    """The nearest numbers of a format, ties to even, saturating; NaN stays NaN."""
    NAN: tl.constexpr = tl.PropagateNan.ALL
    if ELEMENT == "int8":
        return tl.clamp((ratio + 12582912.0) - 12582912.0, -128.0, 127.0, propagate_nan=NAN)
    else:
        MANTISSA: tl.constexpr = 1 if ELEMENT == "e2m1" else 2 if ELEMENT == "e3m2" else 3
        BIAS: tl.constexpr = 7 if ELEMENT == "e4m3" else 3 if ELEMENT == "e3m2" else 1
        MOST: tl.constexpr = (
            448.0 if ELEMENT == "e4m3"
            else 28.0 if ELEMENT == "e3m2"
            else 7.5 if ELEMENT == "e2m3" else 6.0
        )  # fmt: skip
        ratio = tl.clamp(ratio, -MOST, MOST, propagate_nan=NAN)
        exponent = ratio.to(tl.int32, bitcast=True) >> 23 & 255
        exponent = tl.maximum(exponent, 128 - BIAS)
        # Adding and subtracting 1.5 * 2^23 steps rounds to whole steps.
        rounder = ((exponent + 23 - MANTISSA) << 23 | 1 << 22).to(tl.float32, bitcast=True)
        return (ratio + rounder) - rounder


@triton.jit
def _power_of_two(amax, ELEMENT: tl.constexpr):
    """2 to the exponent of ``amax`` less the format's largest; NaN where amax is not finite."""
    LARGEST: tl.constexpr = 4 if ELEMENT == "e3m2" else 2
    exponent = amax.to(tl.int32, bitcast=True) >> 23
    code = tl.maximum(exponent - LARGEST, 0)
    code = tl.where(exponent == 255, 255, code)
    return float_scale(code.to(tl.uint8))


@triton.jit
def _scale_of_groups(x, whole, ELEMENT: tl.constexpr, GROUP: tl.constexpr, E8M0: tl.constexpr):
    """The scales of groups [COUNT, GROUP]; ``whole`` is NVFP4's second scale."""
    amax = largest_magnitude(x, 1)
    if ELEMENT == "e4m3":
        return scale_from(amax, tl.float8e4nv, E8M0, LEAST)
    elif GROUP == NVFP4_GROUP:
        scale = _nearest(tl.div_rn(amax, 6.0 * whole), "e4m3")
        return tl.where(scale == 0, 1.0, scale) * whole
    else:
        return _power_of_two(amax, ELEMENT)


@triton.jit
def round_rows_kernel(
    x_ptr,
    out_ptr,
    given_ptr,
    D,
    stride_xm,
    stride_xd,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    E8M0: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """ORDER: of out's columns (``kernels/column_orders.py``)."""
    stand_between(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    at = tl.arange(0, BLOCK)
    OF_ROW: tl.constexpr = GROUP == 0 or GROUP == NVFP4_GROUP
    whole = 1.0
    if given_ptr is not None:
        whole = tl.load(given_ptr)
    elif OF_ROW:
        most = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, D, BLOCK):
            x = tl.load(x_ptr + (first + at) * stride_xd, first + at < D, 0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        amax = largest_magnitude(most, 0)
        if GROUP == NVFP4_GROUP:
            whole = tl.where(amax == 0, 1.0, tl.div_rn(amax, 448.0 * 6.0))
        elif ELEMENT == "int8":
            whole = scale_from(amax, tl.int8, False, LEAST)
        else:
            whole = scale_from(amax, tl.float8e4nv, False, LEAST_OF_ROW)
    for first in range(0, D, BLOCK):
        column = first + at
        x = tl.load(x_ptr + column * stride_xd, column < D, 0.0).to(tl.float32)
        if GROUP == 0:
            value = _nearest(tl.div_rn(x, whole), ELEMENT) * whole
        else:
            x = tl.reshape(x, (BLOCK // GROUP, GROUP))
            scale = _scale_of_groups(x, whole, ELEMENT, GROUP, E8M0)[:, None]
            value = tl.reshape(_nearest(tl.div_rn(x, scale), ELEMENT) * scale, (BLOCK,))
        if out_ptr.dtype.element_ty == tl.float16:
            value = tl.clamp(value, -MOST_FP16, MOST_FP16, propagate_nan=tl.PropagateNan.ALL)
        place = place_of(column, D, ORDER)
        tl.store(out_ptr + row * D + place, value.to(out_ptr.dtype.element_ty), column < D)


_launch = Launcher(round_rows_kernel, chained=True)


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    given: torch.Tensor | None,
    element: str,
    group: int,
    e8m0: bool,
    order: str,
) -> None:
    """As ``round_rows``, unchecked; ``group`` 0: the whole row, or ``given``."""
    rows, D = x.shape
    if rows == 0 or D == 0:
        return
    block = max(group, min(4096, power_of_2(D)))
    _launch(
        (rows, 1),
        (x, out, given),
        (D, *x.stride()),
        (element, group, e8m0, order, block),
        max(1, min(16, block // 512)),
    )
