"""Rows to fp8 or int8 with scales computed from their values, or with a given scale.

Grid (rows, cdiv(D, BLOCK)) for groups of columns and for a given scale, (rows,) for a scale per
row, which reads its row twice (the second time from the cache); of many rows, a program rounds
several. x [rows, D] of any strides ->
q [rows, D] dense, scale fp32 [rows, cdiv(D, GROUP)]. The helpers do the same on registers.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2

_LARGEST_E4M3 = tl.constexpr(448.0)
_LARGEST_INT8 = tl.constexpr(127.0)
# The floor of largest magnitudes: for a group of columns, and for a whole fp8 row.
LEAST = tl.constexpr(1e-10)
LEAST_OF_ROW = tl.constexpr(1.0 / 512.0)
# Adding and subtracting 1.5 * 2^23 rounds to a whole number, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def scale_from(amax, DTYPE: tl.constexpr, E8M0: tl.constexpr, FLOOR: tl.constexpr):
    """The scale of numbers whose largest magnitude is ``amax``; E8M0 rounds it up to a power of
    two."""
    LARGEST: tl.constexpr = _LARGEST_INT8 if tl.int8 == DTYPE else _LARGEST_E4M3
    scale = tl.div_rn(tl.maximum(amax, FLOOR, propagate_nan=tl.PropagateNan.ALL), LARGEST)
    if E8M0:
        bits = scale.to(tl.int32, bitcast=True)
        up = ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(scale == scale, up, scale)
    return scale


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_magnitude(x, AXIS: tl.constexpr):
    """max |x| along an axis, NaN if any is."""
    return tl.reduce(tl.abs(x), AXIS, _larger)


@triton.jit
def scale_of(x, AXIS: tl.constexpr, DTYPE: tl.constexpr, E8M0: tl.constexpr):
    """Scales of groups that lie along an axis of fp32 numbers."""
    return scale_from(largest_magnitude(x, AXIS), DTYPE, E8M0, LEAST)


@triton.jit
def quantized(x, scale, DTYPE: tl.constexpr):
    """x / scale rounded to nearest, ties to even."""
    x = x * (1.0 / scale)
    if tl.int8 == DTYPE:
        return tl.clamp((x + _ROUNDER) - _ROUNDER, -128.0, 127.0).to(tl.int8)
    else:
        x = tl.clamp(x, -_LARGEST_E4M3, _LARGEST_E4M3, propagate_nan=tl.PropagateNan.ALL)
        return x.to(DTYPE)


@triton.jit
def round_groups(
    x_ptr, q_ptr, scale_ptr, row, first, D, groups, stride_xm, stride_xd, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, E8M0: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row from ``first`` on, with a scale for every GROUP of them."""
    at = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + at * stride_xd, at < D, 0.0).to(tl.float32)
    x = tl.reshape(x, (BLOCK // GROUP, GROUP))
    scale = scale_of(x, 1, q_ptr.dtype.element_ty, E8M0)
    q = tl.reshape(quantized(x, scale[:, None], q_ptr.dtype.element_ty), (BLOCK,))
    group = first // GROUP + tl.arange(0, BLOCK // GROUP)
    tl.store(scale_ptr + row * groups + group, scale, group < groups)
    tl.store(q_ptr + row * D + at, q, at < D)


@triton.jit
def round_given(
    x_ptr, q_ptr, scale_ptr, row, first, D, stride_xm, stride_xd, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK columns of a row from ``first`` on, by the scale there is."""
    at = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + at * stride_xd, at < D, 0.0).to(tl.float32)
    q = quantized(x, tl.load(scale_ptr), q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * D + at, q, at < D)


@triton.jit
def round_row(
    x_ptr, q_ptr, scale_ptr, row, D, stride_xm, stride_xd, BLOCK: tl.constexpr,
    E8M0: tl.constexpr,
):  # fmt: skip
    """A row, with one scale."""
    x_ptr += row * stride_xm
    at = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, D, BLOCK):
        x = tl.load(x_ptr + (first + at) * stride_xd, first + at < D, 0.0).to(tl.float32)
        most = _larger(most, tl.abs(x))
    FLOOR: tl.constexpr = LEAST if q_ptr.dtype.element_ty == tl.int8 else LEAST_OF_ROW
    scale = scale_from(largest_magnitude(most, 0), q_ptr.dtype.element_ty, E8M0, FLOOR)
    tl.store(scale_ptr + row, scale)
    for first in range(0, D, BLOCK):
        x = tl.load(x_ptr + (first + at) * stride_xd, first + at < D, 0.0).to(tl.float32)
        q = quantized(x, scale, q_ptr.dtype.element_ty)
        tl.store(q_ptr + row * D + first + at, q, first + at < D)


@triton.jit
def begin_rounding(BESIDE: tl.constexpr, CHAINED: tl.constexpr):
    """BESIDE: the launch before this one writes nothing that is read here, and began when all
    before it had ended; so rows are rounded beside it."""
    if BESIDE and CHAINED:
        gdc_launch_dependents()
    else:
        follow_previous(CHAINED)


@triton.jit
def end_rounding(BESIDE: tl.constexpr, CHAINED: tl.constexpr):
    """Who waits for this launch waits for the one before it, too."""
    if BESIDE and CHAINED and tl.program_id(0) + tl.program_id(1) == 0:
        gdc_wait()


@triton.jit(do_not_specialize=["rows"])
def quantize_groups_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    D,
    groups,
    stride_xm,
    stride_xd,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    E8M0: tl.constexpr,
    BESIDE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin_rounding(BESIDE, CHAINED)
    first = tl.program_id(1) * BLOCK
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        round_groups(
            x_ptr, q_ptr, scale_ptr, row, first, D, groups, stride_xm, stride_xd, GROUP, BLOCK, E8M0
        )
    end_rounding(BESIDE, CHAINED)


@triton.jit(do_not_specialize=["rows"])
def quantize_row_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    D,
    stride_xm,
    stride_xd,
    BLOCK: tl.constexpr,
    E8M0: tl.constexpr,
    BESIDE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin_rounding(BESIDE, CHAINED)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        round_row(x_ptr, q_ptr, scale_ptr, row, D, stride_xm, stride_xd, BLOCK, E8M0)
    end_rounding(BESIDE, CHAINED)


@triton.jit(do_not_specialize=["rows"])
def quantize_given_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    D,
    stride_xm,
    stride_xd,
    BLOCK: tl.constexpr,
    BESIDE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin_rounding(BESIDE, CHAINED)
    first = tl.program_id(1) * BLOCK
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        round_given(x_ptr, q_ptr, scale_ptr, row, first, D, stride_xm, stride_xd, BLOCK)
    end_rounding(BESIDE, CHAINED)


_launch_groups = Launcher(quantize_groups_kernel, chained=True)
_launch_row = Launcher(quantize_row_kernel, chained=True)
_launch_given = Launcher(quantize_given_kernel, chained=True)
_MOST_PROGRAMS = 4096  # starting one takes 1.3 ns


def quantize(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    group: int | None,
    e8m0: bool,
    given: bool,
    beside: bool = False,
) -> None:
    """As ``quantize_rows`` with its outputs; ``given``: ``scale`` is read instead of written.
    ``beside``: not behind, but beside the launch before, as in ``begin_rounding``."""
    rows, D = x.shape
    if rows == 0 or D == 0:
        return
    sizes = rows, D, *x.stride()
    if given:
        block = min(2048, power_of_2(D))
        grid = _grid(rows, -(-D // block))
        _launch_given(grid, (x, q, scale), sizes, (block, beside), max(1, block // 512))
    elif group is None:
        block = min(8192, power_of_2(D))
        warps = max(1, min(16, block // 512))
        _launch_row(_grid(rows, 1), (x, q, scale), sizes, (block, e8m0, beside), warps)
    else:
        block = max(group, min(1024, power_of_2(D)))
        _launch_groups(
            _grid(rows, -(-D // block)),
            (x, q, scale),
            (rows, D, scale.shape[1], *x.stride()),
            (group, block, e8m0, beside),
            max(1, block // 512),
        )


def _grid(rows: int, parts: int) -> tuple[int, int]:
    return min(rows, max(1, _MOST_PROGRAMS // parts)), parts
