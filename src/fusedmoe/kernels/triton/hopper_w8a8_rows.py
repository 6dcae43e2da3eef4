"""Rows of 8 bits for the products of ``hopper_w8a8``: gathered, quantized where they are not yet,
and put into shared memory a span at a time.

A span is SPAN times 128 columns of the rows of one block, kept as [SPAN, BN, 128] with a scale for
each [SPAN, BN]. Rows come as they are stored (of the weights' dtype, with their scales), or in 16
bits with scales found on the way (ROUNDING):

group    of every 128 columns by their largest magnitude
largest  of a whole row, whose largest magnitude is given
given    one number for all of them
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.gluon_names import reinterpret
from fusedmoe.kernels.triton.hopper_common import tiles_of
from fusedmoe.kernels.triton.quantize import LEAST, LEAST_OF_ROW, quantized, scale_from, scale_of

STEP = gl.constexpr(128)


class RowPointers(NamedTuple):
    """Where rows begin and how far apart they are, in elements; and their scales, from row to row
    and from group to group."""

    rows: gl.tensor
    stride: gl.tensor
    scales: gl.tensor
    scale_stride: gl.tensor
    group_stride: gl.tensor


@gluon.constexpr_function
def span_layout(num_warps, columns):
    """[SPAN * BN, columns]: a thread has an eighth of a line."""
    return gl.BlockedLayout([1, columns // 8], [4, 8], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def elements_of(ROUNDING):
    """Elements of a line as it is loaded: stored rows come in words of four."""
    return 32 if ROUNDING == "stored" else 128


@gluon.jit
def find_rows(task, tasks, sorted_ptr, R, CASE: gl.constexpr):
    """Slots [SPAN * SLOTS] of a task's block, line after line of a span; -1 for places without
    one."""
    ROUNDING: gl.constexpr = CASE.ROUNDING
    columns: gl.constexpr = elements_of(ROUNDING)
    layout: gl.constexpr = gl.SliceLayout(1, span_layout(gl.num_warps(), columns))
    place = gl.arange(0, CASE.SPAN * CASE.SLOTS, layout) % CASE.SLOTS
    at = sorted_ptr + task // tiles_of(CASE) * CASE.SLOTS + place
    slots = gl.load(at, (place < CASE.SLOTS) & (task < tasks), -1, cache_modifier=".cg")
    return gl.where(slots < R, slots, -1)


@gluon.jit
def load_span(
    x, slots, first, D: gl.constexpr, TOP_K: gl.constexpr, BN: gl.constexpr,
    ROUNDING: gl.constexpr,
):  # fmt: skip
    """(elements [LINES, *] of 128 columns each, step after step from ``first`` on; what is known of
    their scales [LINES]). Lines of no slot and columns past D are 0."""
    LINES: gl.constexpr = slots.shape[0]
    COLUMNS: gl.constexpr = elements_of(ROUNDING)
    layout: gl.constexpr = span_layout(gl.num_warps(), COLUMNS)
    step = first + gl.arange(0, LINES, gl.SliceLayout(1, layout)) // BN
    element = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    live = slots >= 0
    row = (gl.where(live, slots, 0) // TOP_K).to(gl.int64)
    element = gl.expand_dims(step * COLUMNS, 1) + gl.expand_dims(element, 0)
    inside = gl.expand_dims(live, 1) & (element < D * COLUMNS // STEP)
    at = x.rows + gl.expand_dims(row * x.stride, 1) + element
    values = gl.load(at, inside, 0, cache_modifier=".cg")
    if ROUNDING == "group":
        known = gl.zeros([LINES], gl.float32, gl.SliceLayout(1, layout))
    elif ROUNDING == "given":
        known = gl.zeros([LINES], gl.float32, gl.SliceLayout(1, layout)) + gl.load(x.scales)
    else:
        at = x.scales + row * x.scale_stride + gl.minimum(step, (D - 1) // STEP) * x.group_stride
        known = gl.load(at, live, 1.0, cache_modifier=".cg").to(gl.float32, bitcast=True)
    return values, known


@gluon.jit
def put_span(
    values, known, x_span, scale_span, E8M0: gl.constexpr, ROUNDING: gl.constexpr
):  # fmt: skip
    """Copy a span to shared memory, in 8 bits, with its scales."""
    DTYPE: gl.constexpr = x_span.dtype
    LINES: gl.constexpr = values.shape[0]
    if ROUNDING == "stored":
        scale = known
        words: gl.constexpr = gl.NVMMASharedLayout(
            swizzle_byte_width=128, element_bitwidth=32, rank=2
        )
        reinterpret(x_span, gl.int32, [LINES, values.shape[1]], words).store(values)
    else:
        lines = reinterpret(x_span, DTYPE, [LINES, STEP], x_span.layout)
        wide = values.to(gl.float32)
        if ROUNDING == "group":
            scale = scale_of(wide, 1, DTYPE, E8M0)
        elif ROUNDING == "largest":
            FLOOR: gl.constexpr = LEAST if gl.int8 == DTYPE else LEAST_OF_ROW
            scale = scale_from(known, DTYPE, E8M0, FLOOR)
        else:
            scale = known
        lines.store(quantized(wide, gl.expand_dims(scale, 1), DTYPE))
    reinterpret(scale_span, gl.float32, [LINES], scale_span.layout).store(scale)
