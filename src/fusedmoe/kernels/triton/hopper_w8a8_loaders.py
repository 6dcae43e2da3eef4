"""The roles of ``hopper_w8a8_roles`` that bring things to shared memory: weights, and rows with all
scales."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_quantized_tasks import STEP_BYTES
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP, find_rows, load_span, put_span
from fusedmoe.kernels.triton.hopper_w8a8_tasks import (
    known,
    load_scales,
    row_scales,
    scales_layout,
    stored_expert,
)
from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.jit
def issue(descs, ring, bar, stage, row, below, byte, DEPTH: gl.constexpr, VALID: gl.constexpr):
    """Load DEPTH steps of two times VALID rows."""
    HALF: gl.constexpr = ring.shape[1] // 2
    BOX: gl.constexpr = descs[0].block_shape[0]
    mbarrier.expect(bar, DEPTH * 2 * VALID * STEP_BYTES)
    for step in gl.static_range(DEPTH):
        part = ring.index(stage * DEPTH + step)
        at = byte + step * STEP_BYTES
        for first in gl.static_range(0, VALID, BOX):
            low, high = part.slice(first, BOX, 0), part.slice(HALF + first, BOX, 0)
            tma.async_copy_global_to_shared(descs[0], [row + first, at], bar, low)
            tma.async_copy_global_to_shared(descs[1], [row + below + first, at], bar, high)


@gluon.jit
def weights_role(
    descs, ring, bars, tables, sizes, KSTEPS: gl.constexpr, TILES: gl.constexpr,
    VALID: gl.constexpr, BN: gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr,
    GUESS: gl.constexpr,
):  # fmt: skip
    """Fill the ring. bars: (full, empty, guessed): what was loaded before the tables were there
    arrives on barriers of its own, and is passed on or loaded again."""
    full, empty, early_bars = bars
    experts_ptr, num_post_ptr = tables
    num_local, desc_rows, below = sizes
    STAGES: gl.constexpr = full.shape[0]
    DEPTH: gl.constexpr = ring.shape[0] // STAGES
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    FILLED: gl.constexpr = (STAGES + KSTEPS - 1) // KSTEPS
    programs = gl.num_programs(0)
    task = gl.program_id(0)
    guessed = False
    if GUESS:
        guessed = task + (FILLED - 1) * programs < TILES * num_local
        if guessed:
            for ahead in range(STAGES):
                target = task + ahead // KSTEPS * programs
                row = target // TILES * desc_rows + target % TILES * WIDE
                byte = ahead % KSTEPS * (DEPTH * STEP_BYTES)
                issue(descs, ring, early_bars.index(ahead), ahead, row, below, byte, DEPTH, VALID)
    if not EARLY:
        gdc_wait()
    tasks = gl.load(num_post_ptr, cache_modifier=".cg") // BN * TILES
    there = 0
    if guessed:
        right = task + (FILLED - 1) * programs < tasks
        for i in gl.static_range(FILLED):
            target = task + i * programs
            expert = stored_expert(target, tasks, experts_ptr, TILES)
            right = right & (expert == target // TILES)
        if right:
            there = STAGES
        for ahead in range(STAGES):
            mbarrier.wait(early_bars.index(ahead), 0)
            if right:
                mbarrier.arrive(full.index(ahead), count=1)
    stage = 0
    phase = 1
    expert = stored_expert(task, tasks, experts_ptr, TILES)
    while task < tasks:
        row = known(expert, num_local) * desc_rows + task % TILES * WIDE
        task += programs
        expert = stored_expert(task, tasks, experts_ptr, TILES)
        for k in range(KSTEPS):
            if there > 0:
                there -= 1
            else:
                mbarrier.wait(empty.index(stage), phase)
                byte = k * (DEPTH * STEP_BYTES)
                issue(descs, ring, full.index(stage), stage, row, below, byte, DEPTH, VALID)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def rows_role(
    x, x_scales, scale_ptr, strides, steps, spans, bars, tables, R, num_local, N: gl.constexpr,
    D: gl.constexpr, TOP_K: gl.constexpr, ROUNDING: gl.constexpr, GROUP: gl.constexpr,
    E8M0: gl.constexpr, GATED: gl.constexpr, SPANS: gl.constexpr, TILES: gl.constexpr,
    TILE: gl.constexpr, VALID: gl.constexpr,
):  # fmt: skip
    """Bring spans of rows, their scales and the weights' to shared memory, in turns to two buffers.

    What a span needs is asked for when the one before it is put down, slots and experts a task
    before that. spans: (rows [2 * SPAN, BN, 128], scales [2 * SPAN, BN], weights' [2 * SPAN or 2,
    TILE], slots [2, BN]); bars: (ready, free).
    """
    x_span, scale_span, w_span, slot_span = spans
    ready, free = bars
    experts_ptr, sorted_ptr, num_post_ptr = tables
    SPAN: gl.constexpr = x_span.shape[0] // 2
    BN: gl.constexpr = x_span.shape[1]
    LINES: gl.constexpr = SPAN * BN
    BY_STEP: gl.constexpr = GROUP > 0
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    W_STEPS: gl.constexpr = SPAN if BY_STEP else 1
    by_line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    x_lines = x_span._reinterpret(x_span.dtype, [2, LINES, STEP], x_span.layout)
    scale_lines = scale_span._reinterpret(gl.float32, [2, LINES], flat)
    w_steps = w_span._reinterpret(
        gl.float32, [2, W_STEPS, TILE], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )

    gdc_wait()
    gdc_launch_dependents()
    programs = gl.num_programs(0)
    task = gl.program_id(0)
    tasks = gl.load(num_post_ptr, cache_modifier=".cg") // BN * TILES
    slots = find_rows(task, tasks, sorted_ptr, R, TILES, BN, LINES, ROUNDING)
    next_slots = find_rows(task + programs, tasks, sorted_ptr, R, TILES, BN, LINES, ROUNDING)
    expert = stored_expert(task, tasks, experts_ptr, TILES)
    next_expert = stored_expert(task + programs, tasks, experts_ptr, TILES)
    values, scales = load_span(x, x_scales, slots, 0, D, TOP_K, BN, ROUNDING)
    w_scales = span_scales(
        scale_ptr, strides, steps, task, known(expert, num_local), 0, N, D, TILE, VALID, TILES,
        SPAN, GATED, GROUP,
    )  # fmt: skip
    turn = 0
    phase = 1
    while task < tasks:
        place = task // TILES * BN + gl.arange(0, BN, by_line)
        out_slots = gl.load(sorted_ptr + place, cache_modifier=".cg")
        coming = stored_expert(task + 2 * programs, tasks, experts_ptr, TILES)
        for span in range(SPANS):
            mbarrier.wait(free.index(turn), phase)
            put_span(
                values, scales, x_lines.index(turn), scale_lines.index(turn), x_span.dtype, E8M0,
                ROUNDING,
            )  # fmt: skip
            w_steps.index(turn).store(float_scale(w_scales))
            slot_span.index(turn).store(gl.where(out_slots < R, out_slots, -1))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(ready.index(turn), count=1)
            turn ^= 1
            phase ^= turn == 0
            last = span + 1 == SPANS
            first = gl.where(last, 0, (span + 1) * SPAN)
            slots = gl.where(last, next_slots, slots)
            values, scales = load_span(x, x_scales, slots, first, D, TOP_K, BN, ROUNDING)
            w_scales = span_scales(
                scale_ptr, strides, steps, gl.where(last, task + programs, task),
                known(gl.where(last, next_expert, expert), num_local), first, N, D, TILE, VALID,
                TILES, SPAN, GATED, GROUP,
            )  # fmt: skip
            if last:
                next_slots = find_rows(
                    task + 2 * programs, tasks, sorted_ptr, R, TILES, BN, LINES, ROUNDING
                )
        task += programs
        expert = next_expert
        next_expert = coming


@gluon.jit
def span_scales(
    scale_ptr, strides, steps, task, expert, first, N: gl.constexpr, D: gl.constexpr,
    TILE: gl.constexpr, VALID: gl.constexpr, TILES: gl.constexpr, SPAN: gl.constexpr,
    GATED: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The scales of a tile's rows [SPAN, TILE] by steps, or [1, TILE] where they have one each."""
    if GROUP > 0:
        return load_scales(
            scale_ptr, strides, steps, task, expert, first, N, D, TILE, VALID, TILES, SPAN, GATED,
            GROUP,
        )  # fmt: skip
    else:
        layout: gl.constexpr = gl.SliceLayout(0, scales_layout(TILE, gl.num_warps()))
        one = row_scales(
            scale_ptr, strides, steps, task, expert, N, TILE, VALID, TILES, GATED, layout
        )
        return gl.expand_dims(one, 0)
