"""What both kernels of ``hopper_w8a8_direct`` do: all steps of their few rows in shared memory, and
the products of a task with them."""

from dataclasses import dataclass

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmoe.kernels.triton.gluon_names import barrier, reinterpret
from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_direct_common import DirectCase
from fusedmoe.kernels.triton.hopper_w8a8_gemm import scaled
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP, load_span, put_span, span_layout
from fusedmoe.kernels.triton.quantize import largest_magnitude


@dataclass(frozen=True, kw_only=True)
class RoundedCase(DirectCase):
    """BN rows, rounded as ROUNDING says: by "group"s of 128 columns, each "row" by its largest
    magnitude, or by a "given" scale; powers of two if E8M0. STEPPED: every product of 128 columns
    is scaled by itself. GROUP: columns that share a weight's scale, 0: all."""

    BN: int
    ROUNDING: str
    E8M0: bool
    STEPPED: bool
    GROUP: int


@gluon.constexpr_function
def steps_of(CASE):
    """Steps of 128 columns that a task takes."""
    return -(-CASE.D // STEP.value)


@gluon.constexpr_function
def padded_steps(CASE):
    """Steps of the rows' and scales' buffers: a power of two."""
    return 1 << (steps_of(CASE) - 1).bit_length()


@gluon.constexpr_function
def steps_at_once(CASE):
    """As many steps of the rows as four warps hold in registers beside what they compute."""
    return min(padded_steps(CASE), max(1, 64 // CASE.BN))


@gluon.jit
def allocate_rows(DTYPE: gl.constexpr, CASE: gl.constexpr):
    """Buffers (rows [steps, BN, 128], their scales [steps, BN], the weights' [steps, ROWS], or one
    step of them that is never looked at)."""
    N: gl.constexpr = CASE.BN
    AT_ONCE: gl.constexpr = steps_at_once(CASE)
    STEPS: gl.constexpr = (steps_of(CASE) + AT_ONCE - 1) // AT_ONCE * AT_ONCE
    W_STEPS: gl.constexpr = padded_steps(CASE) if CASE.GROUP > 0 else 1
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return (
        gl.allocate_shared_memory(DTYPE, [STEPS, N, STEP], shared),
        gl.allocate_shared_memory(gl.float32, [STEPS, N], flat),
        gl.allocate_shared_memory(gl.float32, [W_STEPS, CASE.ROWS], flat),
    )


@gluon.jit
def load_passes(x, slots, first, AHEAD: gl.constexpr, CASE: gl.constexpr):
    """(lines of AHEAD passes from ``first`` on, what is known of their scales)."""
    AT_ONCE: gl.constexpr = steps_at_once(CASE)
    ROUNDING: gl.constexpr = "group" if CASE.ROUNDING == "row" else CASE.ROUNDING
    values, known = load_span(x, slots, first * AT_ONCE, CASE.D, 1, CASE.BN, ROUNDING)
    passes = (values,)
    for i in gl.static_range(1, AHEAD):
        more, _ = load_span(x, slots, (first + i) * AT_ONCE, CASE.D, 1, CASE.BN, ROUNDING)
        passes += (more,)  # type: ignore[assignment]
    return passes, known


@gluon.jit
def larger_lines(most, passes):
    """The largest magnitudes [LINES] so far."""
    for i in gl.static_range(len(passes)):
        line = largest_magnitude(passes[i].to(gl.float32), 1)
        most = gl.maximum(most, line, propagate_nan=tl.PropagateNan.ALL)
    return most


@gluon.jit
def bring_rows(x, first_row, rows, buffers, CASE: gl.constexpr):
    """Rows first_row, ... of x (``RowPointers``), ``rows`` of them, to the buffers, for all steps.

    The largest magnitude of a whole row is found here. A pass is as many steps as are taken at
    once; two are asked for before the first is needed.
    """
    x_rows = buffers[0]
    N: gl.constexpr = CASE.BN
    E8M0: gl.constexpr = CASE.E8M0
    AT_ONCE: gl.constexpr = steps_at_once(CASE)
    LINES: gl.constexpr = AT_ONCE * N
    PASSES: gl.constexpr = x_rows.shape[0] // AT_ONCE
    AHEAD: gl.constexpr = 2 - PASSES % 2
    PUT: gl.constexpr = "largest" if CASE.ROUNDING == "row" else CASE.ROUNDING
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_lines = reinterpret(x_rows, x_rows.dtype, [PASSES, LINES, STEP], x_rows.layout)
    scale_lines = reinterpret(buffers[1], gl.float32, [PASSES, LINES], flat)
    by_line: gl.constexpr = gl.SliceLayout(1, span_layout(gl.num_warps(), STEP))
    place = gl.arange(0, LINES, by_line) % N
    slots = gl.where(place < rows, first_row + place, -1)
    passes, known = load_passes(x, slots, 0, AHEAD, CASE)
    if CASE.ROUNDING == "row":
        most = larger_lines(gl.zeros([LINES], gl.float32, by_line), passes)
        for first in range(AHEAD, PASSES, AHEAD):
            more, _ = load_passes(x, slots, first, AHEAD, CASE)
            most = larger_lines(most, more)
        pairs: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, gl.num_warps()], [1, 0])
        steps = gl.convert_layout(gl.reshape(most, [AT_ONCE, N]), pairs)
        whole = gl.expand_dims(largest_magnitude(steps, 0), 0)
        whole += gl.zeros([AT_ONCE, N], gl.float32, pairs)
        known = gl.convert_layout(gl.reshape(whole, [LINES]), by_line)
    for i in gl.static_range(AHEAD):
        put_span(passes[i], known, x_lines.index(i), scale_lines.index(i), E8M0, PUT)
    for first in range(AHEAD, PASSES, AHEAD):
        more, _ = load_passes(x, slots, first, AHEAD, CASE)
        for i in gl.static_range(AHEAD):
            to, to_scales = x_lines.index(first + i), scale_lines.index(first + i)
            put_span(more[i], known, to, to_scales, E8M0, PUT)
    fence_async_shared()
    barrier()


@gluon.jit
def multiply_rows(
    ring, buffers, bars, stage, phase, CASE: gl.constexpr, ACC: gl.constexpr
):  # fmt: skip
    """The products of one task in fp32, [ROWS, BN], with all scales but a weight's own where it has
    one for its row (no GROUP)."""
    STEPPED: gl.constexpr = CASE.STEPPED
    full, empty = bars
    x_rows = buffers[0]
    M: gl.constexpr = CASE.ROWS
    N: gl.constexpr = CASE.BN
    SUM: gl.constexpr = gl.int32 if ring.dtype == gl.int8 else gl.float32
    total = gl.zeros([M, N], gl.float32 if STEPPED else SUM, ACC)
    for k in range(steps_of(CASE)):
        mbarrier.wait(full.index(stage), phase)
        x = x_rows.index(k).permute((1, 0))
        if STEPPED:
            part = gl.zeros([M, N], SUM, ACC)
            part = warpgroup_mma(ring.index(stage), x, part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
        else:
            total = warpgroup_mma(ring.index(stage), x, total, is_async=True)
            total = warpgroup_mma_wait(0, deps=(total,))
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        if STEPPED:
            total += scaled(part, buffers, k, CASE.GROUP > 0)
        stage, phase = next_stage(stage, phase, CASE.STAGES)
    total = total.to(gl.float32)
    if not STEPPED:
        total *= gl.expand_dims(buffers[1].index(0).load(gl.SliceLayout(0, ACC)), 0)
    return total, stage, phase
