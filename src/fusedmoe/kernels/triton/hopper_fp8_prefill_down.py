"""The second launch of ``hopper_fp8_prefill``: quantized act [P, I], w2 -> y [P, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import cp_async, tma_load
from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_drawn import (
    announce,
    draw,
    hear,
    open_box,
)
from fusedmoe.kernels.triton.hopper_fp8_prefill_common import (
    NO_TASK,
    STEP,
    expect_step,
    filled,
    finished,
    load_features,
    load_weight_scales,
    open_rings,
    packed,
    place,
    scale_row,
    unpacked,
)
from fusedmoe.kernels.triton.hopper_fp8_prefill_multiply import BY_ROW, multiply, open_turns, skip
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    store_tile,
)
from fusedmoe.kernels.triton.hopper_pushed import lines_of, push_tile, slots_of_half

UNSPECIALIZED = (
    "stride_am", "scale_blocks", "stride_se", "stride_sn", "scale_row_step", "scale_block", "R",
    "num_local", "picks_at", "share",
)  # fmt: skip


@gluon.jit
def down_producer(
    descs,
    box,
    counter_ptr,
    act_scales,
    rings,
    bars,
    tables,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
    OWN: gl.constexpr,
):
    """As ``hopper_prefill_down.down_producer``, of bytes."""
    a_ring, b_ring, scale_ring = rings
    full, empty = bars
    act_desc, w_desc = descs
    BOX: gl.constexpr = act_desc.block_shape[0]
    act_scale_ptr, _, scale_blocks = act_scales
    row = gl.arange(0, BLOCK_M, gl.BlockedLayout([4], [32], [1], [0]))
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    STAGES: gl.constexpr = a_ring.shape[0]
    KSTEPS: gl.constexpr = (I + STEP - 1) // STEP
    blocks = gl.load(num_post_ptr) // BLOCK_M
    tasks = blocks * TILES
    first = gl.program_id(0)
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(STAGES, KSTEPS)
    if first < tasks:
        block, tile, expert = place(first, blocks, expert_ids_ptr, num_local, TILES, GROUP)
        n = filled(block, sorted_ptr, R)
        weight_row = expert * H + tile * (2 * TILE_N)
        for stage in gl.static_range(EARLY):
            bar = full.index(stage)
            expect_step(bar, n, BOX)
            tma_load(w_desc, [weight_row, stage * STEP], bar, b_ring.index(stage))
    gdc_wait()
    gdc_launch_dependents()
    stage = 0
    phase = 1
    number = 0
    task = first
    coming = tasks
    while task < tasks:
        block, tile, expert = place(task, blocks, expert_ids_ptr, num_local, TILES, GROUP)
        n = filled(block, sorted_ptr, R)
        announce(box, number, packed(block, tile, expert, n))
        number += 1
        act_row = block * BLOCK_M
        weight_row = expert * H + tile * (2 * TILE_N)
        for k in range(KSTEPS):
            if k == KSTEPS // 2:
                coming = draw(counter_ptr, R)
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if (task != first) | (k >= EARLY):
                expect_step(bar, n, BOX)
                tma_load(w_desc, [weight_row, k * STEP], bar, b_ring.index(stage))
            for i in gl.static_range(0, BLOCK_M, BOX):
                part = a_ring.index(stage).slice(i, BOX, 0)
                tma_load(act_desc, [act_row + i, k * STEP], bar, part, pred=i < 16 << n)
            if OWN:
                scale = act_scale_ptr + (k * scale_blocks + block) * BLOCK_M + row
                cp_async(scale_ring.index(stage), scale)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce(box, number, NO_TASK)


@gluon.jit
def down_consumer(
    out_desc,
    buffers,
    box,
    bias_ptr,
    act_scales,
    scales,
    rings,
    bars,
    turns,
    sorted_ptr,
    push,
    R,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PROMOTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    BY_FEATURE: gl.constexpr,
    OWN: gl.constexpr,
    WHICH: gl.constexpr,
):
    act_scale_ptr, stride_am, _ = act_scales
    bases_ptr, _, _ = push
    KSTEPS: gl.constexpr = (I + STEP - 1) // STEP
    stage = 0
    phase = 0
    turn = 1 - WHICH
    number = 0
    # The scales of act are read here, not only by the producer.
    gdc_wait()
    word = hear(box, number)
    while word >= 0:
        row, tile, expert, rows = unpacked(word, WHICH)
        column = tile * (2 * TILE_N)
        if rows > 0:
            if bases_ptr is not None:
                slots = slots_of_half(sorted_ptr, row)
            low_scales = None
            high_scales = None
            row_scale = None
            of_low = None
            of_high = None
            low_bias = None
            high_bias = None
            if not OWN:
                at = row + gl.arange(0, HALF_M, BY_ROW)
                row_scale = gl.load(act_scale_ptr + at * stride_am, cache_modifier=".cg")
            if PER_SCALE > 0:
                low_scales = scale_row(scales, expert, 0, column, H)
                high_scales = scale_row(scales, expert, 0, column + TILE_N, H)
            else:
                of_low, of_high = load_weight_scales(
                    scales[0], expert, column, TILE_N, 1, TILE_N, 1, H, BY_FEATURE
                )
            if bias_ptr is not None:
                at = bias_ptr + expert.to(gl.int64) * H + column
                low_bias = load_features(at, 1, H - column)
                high_bias = load_features(at + TILE_N, 1, H - column - TILE_N)
            low, high, stage, phase, turn = multiply(
                rings, bars, stage, phase, turns, turn, low_scales, high_scales, KSTEPS, PER_SCALE,
                OWN, PROMOTED, WHICH,
            )  # fmt: skip
            low, high = finished(
                low, high, row_scale, of_low, of_high, low_bias, high_bias, buffers.index(0),
                PER_SCALE == 0, BY_FEATURE, bias_ptr is not None,
            )  # fmt: skip
            if bases_ptr is None:
                store_tile(out_desc, buffers, low, row, column, rows)
                store_tile(out_desc, buffers, high, row, column + TILE_N, rows)
            else:
                lines, there = lines_of(push, slots, R, H, buffers.dtype)
                push_tile(lines, there, buffers, low, column, H)
                push_tile(lines, there, buffers, high, column + TILE_N, H)
        else:
            stage, phase, turn = skip(
                bars, stage, phase, turns, turn, KSTEPS, rings[0].shape[0],
                OWN or PROMOTED == 1, WHICH,
            )  # fmt: skip
        number += 1
        word = hear(box, number)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    act_desc,
    w_desc,
    out_desc,
    bias_ptr,
    act_scale_ptr,
    scale_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counter_ptr,
    bases_ptr,
    stride_am,
    scale_blocks,
    stride_se,
    stride_sn,
    scale_row_step,
    scale_block,
    R,
    num_local,
    picks_at,
    share,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PROMOTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    BY_FEATURE: gl.constexpr,
    OWN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """act_scale_ptr: one number, one per row (``stride_am`` apart), or OWN: [I / 128, P] with P =
    128 * scale_blocks. ``bases_ptr``: as in ``hopper_prefill_down``. Others as in ``up_kernel``."""
    TILES: gl.constexpr = (H + 2 * TILE_N - 1) // (2 * TILE_N)
    rings, bars, out0, out1 = open_rings(w_desc, out_desc, STAGES, 32 if OWN else 0, OWN)
    turns = open_turns(OWN or PROMOTED == 1)
    box = open_box(2, gl.int64)
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    scales = (scale_ptr, stride_se, stride_sn, 0, scale_row_step, scale_block)
    act_scales = (act_scale_ptr, stride_am, scale_blocks)
    push = (bases_ptr, picks_at, share)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (
                    out_desc, out0, box, bias_ptr, act_scales, scales, rings, bars, turns,
                    sorted_ptr, push, R, H, I, PROMOTED, PER_SCALE, BY_FEATURE, OWN, 0,
                ),
            ),
            (
                down_consumer,
                (
                    out_desc, out1, box, bias_ptr, act_scales, scales, rings, bars, turns,
                    sorted_ptr, push, R, H, I, PROMOTED, PER_SCALE, BY_FEATURE, OWN, 1,
                ),
            ),
            (
                down_producer,
                (
                    (act_desc, w_desc), box, counter_ptr, act_scales, rings, bars, tables, R,
                    num_local, H, I, TILES, GROUP, OWN,
                ),
            ),
        ],
        # More registers for consumers spill more: products would overlap sums that do not fit.
        [4, 1],
        [216, 72],
    )  # fmt: skip
