"""The GEMM of ``hopper_w8a8_gemm`` with a role for each kind of waiting.

One warp keeps the ring filled, four bring the rows of slots and all scales to shared memory, a span
ahead and in two buffers, and eight multiply and store: what they wait for is in shared memory, so
that neither tables nor rows on their way, nor TMA's own queue, holds up a product.

grid (programs,), arguments as there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_w8a8_finish import features_layout, finish_task
from fusedmoe.kernels.triton.hopper_w8a8_loaders import rows_role, weights_role
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP
from fusedmoe.kernels.triton.hopper_w8a8_tasks import known, stored_expert

UNSPECIALIZED = ("R", "num_local", "desc_rows")


@gluon.jit
def products_role(
    bias_ptr, out_ptr, largest_ptr, ring, spans, bars, tables, num_local, bias_steps, numbers,
    N: gl.constexpr, FORMULA: gl.constexpr, GATED: gl.constexpr, STEPPED: gl.constexpr,
    BY_STEP: gl.constexpr, KSTEPS: gl.constexpr, TILES: gl.constexpr, VALID: gl.constexpr,
):  # fmt: skip
    """Multiply what is in shared memory, and store. bars: (full, empty, ready, free)."""
    full, empty, ready, free = bars
    x_span, scale_span, w_span, slot_span = spans
    experts_ptr, num_post_ptr = tables
    STAGES: gl.constexpr = full.shape[0]
    DEPTH: gl.constexpr = ring.shape[0] // STAGES
    TILE: gl.constexpr = ring.shape[1]
    SPAN: gl.constexpr = x_span.shape[0] // 2
    BN: gl.constexpr = x_span.shape[1]
    PER_SPAN: gl.constexpr = SPAN // DEPTH
    SPANS: gl.constexpr = (KSTEPS + PER_SPAN - 1) // PER_SPAN
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    SUM: gl.constexpr = gl.int32 if ring.dtype == gl.int8 else gl.float32
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_slot: gl.constexpr = gl.SliceLayout(0, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, features_layout(TILE // 2, gl.num_warps()))
    W_STEPS: gl.constexpr = SPAN if BY_STEP else 1

    gdc_wait()
    tasks = gl.load(num_post_ptr, cache_modifier=".cg") // BN * TILES
    stage = 0
    phase = 0
    turn = 0
    span_phase = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        expert = stored_expert(task, tasks, experts_ptr, TILES)
        total = gl.zeros([TILE, BN], gl.float32 if STEPPED else SUM, mma)
        slots = gl.zeros([BN], gl.int32, by_column)
        w_scale = gl.zeros([TILE], gl.float32, by_row)
        x_scale = gl.zeros([BN], gl.float32, by_slot)
        for span in range(SPANS):
            mbarrier.wait(ready.index(turn), span_phase)
            slots = slot_span.index(turn).load(by_column)
            if not BY_STEP:
                w_scale = w_span.index(turn * W_STEPS).load(by_row)
            if not STEPPED:
                x_scale = scale_span.index(turn * SPAN).load(by_slot)
            for k in range(gl.minimum(PER_SPAN, KSTEPS - span * PER_SPAN)):
                at = turn * SPAN + k * DEPTH
                mbarrier.wait(full.index(stage), phase)
                x_tile = x_span.index(at).permute((1, 0))
                x_other = x_span.index(at + DEPTH - 1).permute((1, 0))
                first = ring.index(stage * DEPTH)
                second = ring.index(stage * DEPTH + DEPTH - 1)
                if STEPPED:
                    none = gl.zeros([TILE, BN], SUM, mma)
                    part = warpgroup_mma(first, x_tile, none, use_acc=False, is_async=True)
                    if DEPTH == 2:
                        other = warpgroup_mma(second, x_other, none, use_acc=False, is_async=True)
                        factor = step_factor(scale_span, w_span, at, BY_STEP, mma)
                        factor_other = step_factor(scale_span, w_span, at + 1, BY_STEP, mma)
                        part, other = warpgroup_mma_wait(0, deps=(part, other))
                        gl.thread_barrier()
                        mbarrier.arrive(empty.index(stage), count=1)
                        total += part.to(gl.float32) * factor
                        total += other.to(gl.float32) * factor_other
                    else:
                        factor = step_factor(scale_span, w_span, at, BY_STEP, mma)
                        part = warpgroup_mma_wait(0, deps=(part,))
                        gl.thread_barrier()
                        mbarrier.arrive(empty.index(stage), count=1)
                        total += part.to(gl.float32) * factor
                else:
                    total = warpgroup_mma(first, x_tile, total, is_async=True)
                    if DEPTH == 2:
                        total = warpgroup_mma(second, x_other, total, is_async=True)
                    total = warpgroup_mma_wait(0, deps=(total,))
                    gl.thread_barrier()
                    mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = next_stage(stage, phase, STAGES)
            gl.thread_barrier()
            mbarrier.arrive(free.index(turn), count=1)
            turn ^= 1
            span_phase ^= turn == 0
        total = total.to(gl.float32)
        if not STEPPED:
            total *= gl.expand_dims(x_scale, 0)
        if not BY_STEP:
            total *= gl.expand_dims(w_scale, 1)
        finish_task(
            total, known(expert, num_local), task % TILES * WIDE, slots, bias_ptr, out_ptr,
            largest_ptr, bias_steps, numbers, FORMULA, GATED, VALID, N,
        )  # fmt: skip


@gluon.jit
def step_factor(scale_span, w_span, step, BY_STEP: gl.constexpr, LAYOUT: gl.constexpr):
    """The scales of a step's columns, [1, BN] or [TILE, BN]."""
    factor = gl.expand_dims(scale_span.index(step).load(gl.SliceLayout(0, LAYOUT)), 0)
    if BY_STEP:
        w_scale = w_span.index(step).load(gl.SliceLayout(1, LAYOUT))
        factor = factor * gl.expand_dims(w_scale, 1)
    return factor


@gluon.jit
def open_pairs(COUNT: gl.constexpr):
    """COUNT barriers that one arrival opens."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def roles_kernel(
    low_desc,
    high_desc,
    x_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    largest_ptr,
    experts_ptr,
    sorted_ptr,
    num_post_ptr,
    R,
    num_local,
    desc_rows,
    below,
    stride_x,
    stride_xs,
    stride_xg,
    stride_se,
    stride_sn,
    scale_shard_step,
    scale_row_step,
    scale_block,
    row_shard_step,
    row_step,
    limit,
    alpha,
    beta,
    N: gl.constexpr,
    D: gl.constexpr,
    TOP_K: gl.constexpr,
    ROUNDING: gl.constexpr,
    STEPPED: gl.constexpr,
    GROUP: gl.constexpr,
    E8M0: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    EARLY: gl.constexpr,
    GUESS: gl.constexpr,
    TILE: gl.constexpr,
    VALID: gl.constexpr,
    BN: gl.constexpr,
    DEPTH: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
):
    DTYPE: gl.constexpr = low_desc.dtype
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    KSTEPS: gl.constexpr = (D + DEPTH * STEP - 1) // (DEPTH * STEP)
    SPANS: gl.constexpr = (KSTEPS * DEPTH + SPAN - 1) // SPAN
    TILES: gl.constexpr = (N + WIDE - 1) // WIDE
    BY_STEP: gl.constexpr = GROUP > 0
    W_STEPS: gl.constexpr = SPAN if BY_STEP else 1
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_shared: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=8, rank=2
    )
    ring = gl.allocate_shared_memory(DTYPE, [STAGES * DEPTH, TILE, STEP], low_desc.layout)
    spans = (
        gl.allocate_shared_memory(DTYPE, [2 * SPAN, BN, STEP], x_shared),
        gl.allocate_shared_memory(gl.float32, [2 * SPAN, BN], flat),
        gl.allocate_shared_memory(gl.float32, [2 * W_STEPS, TILE], flat),
        gl.allocate_shared_memory(gl.int32, [2, BN], flat),
    )
    full, empty, early_bars = open_pairs(STAGES), open_pairs(STAGES), open_pairs(STAGES)
    ready, free = open_pairs(2), open_pairs(2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                products_role,
                (
                    bias_ptr, out_ptr, largest_ptr, ring, spans, (full, empty, ready, free),
                    (experts_ptr, num_post_ptr), num_local, (row_shard_step, row_step),
                    (limit, alpha, beta), N, FORMULA, GATED, STEPPED, BY_STEP, KSTEPS, TILES,
                    VALID,
                ),
            ),
            (
                rows_role,
                (
                    (x_ptr, stride_x), (x_scale_ptr, stride_xs, stride_xg), scale_ptr,
                    (stride_se, stride_sn), (scale_shard_step, scale_row_step, scale_block),
                    spans, (ready, free), (experts_ptr, sorted_ptr, num_post_ptr), R, num_local,
                    N, D, TOP_K, ROUNDING, GROUP, E8M0, GATED, SPANS, TILES, TILE, VALID,
                ),
            ),
            (
                weights_role,
                (
                    (low_desc, high_desc), ring, (full, empty, early_bars),
                    (experts_ptr, num_post_ptr), (num_local, desc_rows, below), KSTEPS, TILES,
                    VALID, BN, GATED, EARLY, GUESS,
                ),
            ),
        ],
        [4, 1],
        [120, 32],
    )  # fmt: skip
