"""One GEMM of ``hopper_w8a8``: weights stream through a ring to the WGMMA, as they are stored.

grid (programs,): x rows (row slot // TOP_K), w -> out [R, N], row = slot, after bias and
activation. Weights are the M side of a product, the slots of a block its N side.

Every product of 128 columns is added to the sum in fp32, with its scales: tensor cores cut off bits
of longer fp8 sums. int8 sums are exact; where rows have one scale, they run through.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import barrier, reinterpret
from fusedmoe.kernels.triton.hopper_common import (
    Scales,
    known,
    next_stage,
    open_barriers,
    tiles_of,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_w8a8_finish import features_layout, finish_task
from fusedmoe.kernels.triton.hopper_w8a8_rows import (
    STEP,
    RowPointers,
    find_rows,
    load_span,
    put_span,
)
from fusedmoe.kernels.triton.hopper_w8a8_tasks import (
    are_all,
    ask_for_scales,
    experts_of,
    fill,
    first_tasks,
    guessed_experts,
    load_scales,
    row_scales,
    stages_of,
    stored_expert,
)
from fusedmoe.kernels.triton.quantized_common import float_scale

UNSPECIALIZED = ("R", "blocks", "num_local", "desc_rows", "scale_count")


@dataclass(frozen=True, kw_only=True)
class StreamCase:
    """What is constant in a launch: products of D columns with the weights of N features; PICKS
    slots share a row, which is rounded as ROUNDING says (``hopper_w8a8_rows``). STEPPED: every
    product of 128 columns is scaled by itself. GROUP: columns that share a weight's scale, 0: all.

    EARLY: tables are from a launch before the one in front, so weights are loaded before that ends.
    GUESS: they are loaded before the tables are there, as if every expert had one block, and again
    where that was wrong.

    A tile has ROWS weight rows, of each half VALID loaded, and SLOTS slots. The ring has STAGES of
    DEPTH steps; a span of rows has SPAN steps.
    """

    N: int
    D: int
    PICKS: int
    ROUNDING: str
    E8M0: bool
    STEPPED: bool
    GROUP: int
    FORMULA: str
    GATED: bool
    EARLY: bool
    GUESS: bool
    ROWS: int
    VALID: int
    SLOTS: int
    DEPTH: int
    SPAN: int
    STAGES: int


@gluon.jit
def scaled(part, spans, step, BY_STEP: gl.constexpr):
    """A step's product times the scales of its columns; the weights' own where BY_STEP."""
    by_row: gl.constexpr = gl.SliceLayout(1, part.type.layout)
    by_slot: gl.constexpr = gl.SliceLayout(0, part.type.layout)
    factor = gl.expand_dims(spans[1].index(step).load(by_slot), 0)
    if BY_STEP:
        factor *= gl.expand_dims(spans[2].index(step).load(by_row), 1)
    return part.to(gl.float32) * factor


@gluon.jit
def add_products(total, ring, spans, stage, k, CASE: gl.constexpr):
    """total + the products of a stage, DEPTH steps. spans: (rows, their scales, the weights')."""
    DEPTH: gl.constexpr = CASE.DEPTH
    BY_STEP: gl.constexpr = CASE.GROUP > 0
    SUM: gl.constexpr = gl.int32 if ring.dtype == gl.int8 else gl.float32
    first = ring.index(stage * DEPTH)
    x_first = spans[0].index(k * DEPTH).permute((1, 0))
    second = ring.index(stage * DEPTH + DEPTH - 1)
    x_second = spans[0].index(k * DEPTH + DEPTH - 1).permute((1, 0))
    if not CASE.STEPPED:
        total = warpgroup_mma(first, x_first, total, is_async=True)
        if DEPTH == 2:
            total = warpgroup_mma(second, x_second, total, is_async=True)
        return warpgroup_mma_wait(0, deps=(total,))
    else:
        layout: gl.constexpr = total.type.layout
        none = gl.zeros([total.shape[0], total.shape[1]], SUM, layout)
        part = warpgroup_mma(first, x_first, none, use_acc=False, is_async=True)
        if DEPTH == 2:
            other = warpgroup_mma(second, x_second, none, use_acc=False, is_async=True)
            part, other = warpgroup_mma_wait(0, deps=(part, other))
            total += scaled(part, spans, k * DEPTH, BY_STEP)
            return total + scaled(other, spans, k * DEPTH + 1, BY_STEP)
        else:
            part = warpgroup_mma_wait(0, deps=(part,))
            return total + scaled(part, spans, k, BY_STEP)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def gemm_kernel(
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
    blocks,
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
    scale_count,
    limit,
    alpha,
    beta,
    CASE: gl.constexpr,
):
    """largest_ptr int32 [R], or None: raised to the bits of the largest magnitudes of out's rows.
    blocks: how many the tables have room for. Entries behind those in use name no slot, so those of
    the first tasks are read at once, before the number in use is known."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = low_desc.dtype
    TOTAL: gl.constexpr = gl.int32 if gl.int8 == DTYPE and not CASE.STEPPED else gl.float32
    ROWS: gl.constexpr = CASE.ROWS
    BN: gl.constexpr = CASE.SLOTS
    SPAN: gl.constexpr = CASE.SPAN
    STAGES: gl.constexpr = CASE.STAGES
    ROUNDING: gl.constexpr = CASE.ROUNDING
    KSTEPS: gl.constexpr = stages_of(CASE)
    PER_SPAN: gl.constexpr = SPAN // CASE.DEPTH
    SPANS: gl.constexpr = (KSTEPS + PER_SPAN - 1) // PER_SPAN
    TILES: gl.constexpr = tiles_of(CASE)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_slot: gl.constexpr = gl.SliceLayout(0, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, features_layout(ROWS // 2, WARPS))
    x_shared: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=8, rank=2
    )
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(DTYPE, [STAGES * CASE.DEPTH, ROWS, STEP], low_desc.layout)
    x_span = gl.allocate_shared_memory(DTYPE, [SPAN, BN, STEP], x_shared)
    scale_span = gl.allocate_shared_memory(gl.float32, [SPAN, BN], flat)
    BY_STEP: gl.constexpr = CASE.GROUP > 0
    # Unless the weights' scales change by step, this one is never read.
    w_span = gl.allocate_shared_memory(gl.float32, [SPAN if BY_STEP else 1, ROWS], flat)
    w_all = reinterpret(
        w_span, gl.float32, [w_span.shape[0], ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    spans = (x_span, scale_span, w_span)
    bars = open_barriers(STAGES, 0)
    descs = (low_desc, high_desc)
    x = RowPointers(x_ptr, stride_x, x_scale_ptr, stride_xs, stride_xg)
    scales = Scales(scale_ptr, stride_se, stride_sn, scale_shard_step, scale_row_step, scale_block)
    sizes = (num_local, desc_rows, below)
    # How many tasks the ring's first filling covers, and so how far it may be ahead of products;
    # slots and experts are asked for one task earlier.
    FILLED: gl.constexpr = (STAGES + KSTEPS - 1) // KSTEPS
    queue = first_tasks(FILLED)
    if BY_STEP:
        ask_for_scales(scale_ptr, scale_count)
    if CASE.GUESS:
        guess = guessed_experts(queue, num_local, TILES)
        guessed = queue[FILLED - 1] < TILES * num_local
        if guessed:
            for stage in range(STAGES):
                fill(stage, stage, queue, guess, TILES * num_local, descs, ring, bars, sizes, CASE)
    if not CASE.EARLY:
        gdc_wait()
        gdc_launch_dependents()
    tasks = gl.load(num_post_ptr, cache_modifier=".cg") // BN * TILES
    places = blocks * TILES
    experts = experts_of(queue, places, experts_ptr, TILES)
    slots = find_rows(queue[0], places, sorted_ptr, R, CASE)
    second = queue[FILLED - 1] + gl.num_programs(0)
    second_expert = stored_expert(second, places, experts_ptr, TILES)
    phase = 0
    filled = False
    if CASE.GUESS:
        filled = guessed & are_all(experts, guess, queue, tasks)
        if guessed & (not filled):
            phase = 1
            for stage in range(STAGES):
                mbarrier.wait(bars.index(stage), 0)
    if not filled:
        for stage in range(STAGES):
            fill(stage, stage, queue, experts, tasks, descs, ring, bars, sizes, CASE)
    queue += (second,)
    experts += (second_expert,)
    next_slots = find_rows(queue[1], places, sorted_ptr, R, CASE)
    if BY_STEP:
        w_scales = load_scales(scales, queue[0], known(experts[0], num_local), 0, SPAN, CASE)
    if CASE.EARLY:
        gdc_wait()
        gdc_launch_dependents()
    values, known_scales = load_span(x, slots, 0, CASE.D, CASE.PICKS, BN, ROUNDING)
    stage = 0
    while queue[0] < tasks:
        task = queue[0]
        expert = known(experts[0], num_local)
        coming = queue[FILLED] + gl.num_programs(0)
        queue += (coming,)
        experts += (stored_expert(coming, tasks, experts_ptr, TILES),)
        out_slots = gl.load(
            sorted_ptr + task // TILES * BN + gl.arange(0, BN, by_column), cache_modifier=".cg"
        )
        if not BY_STEP:
            w_scale = row_scales(scales, task, expert, CASE, by_row)
        total = gl.zeros([ROWS, BN], TOTAL, mma)
        for span in range(SPANS):
            put_span(values, known_scales, x_span, scale_span, CASE.E8M0, ROUNDING)
            if BY_STEP:
                w_all.store(float_scale(w_scales))
            fence_async_shared()
            barrier()
            last = span + 1 == SPANS
            first = gl.where(last, 0, (span + 1) * SPAN)
            slots = gl.where(last, next_slots, slots)
            values, known_scales = load_span(x, slots, first, CASE.D, CASE.PICKS, BN, ROUNDING)
            if BY_STEP:
                coming_task = gl.where(last, queue[1], task)
                coming_expert = gl.where(last, known(experts[1], num_local), expert)
                w_scales = load_scales(scales, coming_task, coming_expert, first, SPAN, CASE)
            if last:
                next_slots = find_rows(queue[2], tasks, sorted_ptr, R, CASE)
            for k in range(gl.minimum(PER_SPAN, KSTEPS - span * PER_SPAN)):
                mbarrier.wait(bars.index(stage), phase)
                total = add_products(total, ring, spans, stage, k, CASE)
                barrier()
                fill(
                    span * PER_SPAN + k + STAGES, stage, queue, experts, tasks, descs, ring, bars,
                    sizes, CASE,
                )  # fmt: skip
                stage, phase = next_stage(stage, phase, STAGES)

        column = task % TILES * wide_of(CASE)
        total = total.to(gl.float32)
        if not CASE.STEPPED:
            total *= gl.expand_dims(scale_span.index(0).load(by_slot), 0)
        if not BY_STEP:
            total *= gl.expand_dims(float_scale(w_scale), 1)
        finish_task(
            total, expert, column, gl.where(out_slots < R, out_slots, -1), bias_ptr, out_ptr,
            largest_ptr, (row_shard_step, row_step), (limit, alpha, beta), CASE,
        )  # fmt: skip
        queue = queue[1:]
        experts = experts[1:]
