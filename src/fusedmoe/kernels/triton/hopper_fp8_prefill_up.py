"""The first launch of ``hopper_fp8_prefill``: 8-bit x [T, H], w1 -> act [P, I], position [R]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.gluon_names import cp_async, tma_load
from fusedmoe.kernels.triton.hopper_arrivals import await_rows
from fusedmoe.kernels.triton.hopper_common import hopper_activation, next_stage
from fusedmoe.kernels.triton.hopper_drawn import (
    announce,
    clear,
    draw,
    let_go,
    open_box,
    post,
    read,
)
from fusedmoe.kernels.triton.hopper_fp8_prefill_common import (
    NO_TASK,
    ONE_EACH,
    STEP,
    filled,
    finished,
    load_features,
    load_weight_scales,
    open_rings,
    packed,
    place,
    scale_row,
    store_act,
    unpacked,
)
from fusedmoe.kernels.triton.hopper_fp8_prefill_multiply import BY_ROW, multiply, open_turns, skip
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
)
from fusedmoe.kernels.triton.hopper_prefill_up import gather, rows_at

UNSPECIALIZED = (
    "stride_xs", "stride_se", "stride_sn", "scale_shard_step", "scale_row_step", "scale_block",
    "P", "R", "num_local", "desc_rows", "me", "max_polls",
)  # fmt: skip


@gluon.jit
def up_producer(
    descs,
    box,
    counter_ptr,
    rings,
    bars,
    x,
    x_scales,
    position_ptr,
    tables,
    arrivals,
    sizes,
    H: gl.constexpr,
    PICKS: gl.constexpr,
    WORLD: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
    STEPPED: gl.constexpr,
):
    """As ``hopper_prefill_up.up_producer``, of bytes."""
    a_ring, b_ring, scale_ring = rings
    full, empty = bars
    x_scale_ptr, stride_xs = x_scales
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, desc_rows = sizes
    STAGES: gl.constexpr = a_ring.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, layout)), 0)

    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 1
    number = 0
    all_here = 0
    task = gl.program_id(0)
    tasks = blocks * TILES
    coming = tasks
    while task < tasks:
        block, tile, expert = place(task, blocks, expert_ids_ptr, num_local, TILES, GROUP)
        all_here = await_rows(arrivals, block, all_here, WORLD)
        n = filled(block, sorted_ptr, R)
        at = block * BLOCK_M + row
        x_rows, lives = rows_at(at, tile == 0, x, position_ptr, sorted_ptr, R, PICKS)
        at += HALF_M
        x_rest, lives_rest = rows_at(at, tile == 0, x, position_ptr, sorted_ptr, R, PICKS)
        slots = gl.load(sorted_ptr + block * BLOCK_M + gl.arange(0, BLOCK_M, ONE_EACH))
        scaled = (slots >= 0) & (slots < R)
        row_scales = x_scale_ptr + (slots // PICKS).to(gl.int64) * stride_xs
        if STEPPED:
            clear(box, number)
        else:
            row_scale = gl.load(row_scales, scaled, 0.0, cache_modifier=".cg")
            clear(box, number)
            scale_ring.index(number % 2).store(row_scale)
        post(box, number, packed(block, tile, expert, n))
        number += 1
        weight_row = expert * desc_rows + tile * WIDE
        for k in range(0, H, STEP):
            if k == H // STEP // 2 * STEP:  # early enough for its latency, as late as can be
                coming = draw(counter_ptr, R)
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * TILE_N * STEP)
            low = b_ring.index(stage).slice(0, TILE_N, 0)
            high = b_ring.index(stage).slice(TILE_N, TILE_N, 0)
            tma_load(descs[0], [weight_row, k], bar, low)
            tma_load(descs[1], [weight_row + BELOW, k], bar, high)
            gather(a_ring.index(stage).slice(0, HALF_M, 0), x_rows, lives, k + column, H, STEP)
            if n == 3:
                rest = a_ring.index(stage).slice(HALF_M, HALF_M, 0)
                gather(rest, x_rest, lives_rest, k + column, H, STEP)
            if STEPPED:
                cp_async(scale_ring.index(stage), row_scales + k // STEP, scaled)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce(box, number, NO_TASK)


@gluon.jit
def up_consumer(
    out,
    box,
    bias_ptr,
    scales,
    rings,
    bars,
    turns,
    numbers,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    PROMOTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    BY_FEATURE: gl.constexpr,
    ROUNDED: gl.constexpr,
    OWN: gl.constexpr,
    E8M0: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    WHICH: gl.constexpr,
):
    limit, alpha, beta = numbers
    KSTEPS: gl.constexpr = (H + STEP - 1) // STEP
    SHARDS: gl.constexpr = 2 if GATED else 1
    # From a feature to the next, and from one of low to its partner of high.
    BY: gl.constexpr = 2 if INTERLEAVED else 1
    TO_HIGH: gl.constexpr = (1 if INTERLEAVED else I) if GATED else TILE_N
    if ROUNDED and not OWN:
        out = (out[0], out[1], 1.0 / gl.load(out[2]), out[3])
    stage = 0
    phase = 0
    turn = 1 - WHICH
    number = 0
    word = read(box, number)
    while word >= 0:
        row, tile, expert, rows = unpacked(word, WHICH)
        row_scale = None
        if PER_SCALE == 0:
            row_scale = rings[2].index(number % 2).slice(WHICH * HALF_M, HALF_M, 0).load(BY_ROW)
        let_go(box, number)
        column = tile * WIDE
        if rows > 0:
            low_scales = None
            high_scales = None
            of_low = None
            of_high = None
            low_bias = None
            high_bias = None
            if PER_SCALE > 0:
                low_scales = scale_row(scales, expert, 0, column, I)
                high_scales = scale_row(scales, expert, SHARDS - 1, column + BELOW, I)
            else:
                of_low, of_high = load_weight_scales(
                    scales[0], expert, column, BELOW, BY, TO_HIGH, SHARDS, I, BY_FEATURE
                )
            if bias_ptr is not None:
                at = bias_ptr + expert.to(gl.int64) * (SHARDS * I) + column * BY
                low_bias = load_features(at, BY, I - column)
                high_bias = load_features(at + TO_HIGH, BY, I - column - BELOW)
            low, high, stage, phase, turn = multiply(
                rings, bars, stage, phase, turns, turn, low_scales, high_scales, KSTEPS, PER_SCALE,
                PER_SCALE > 0, PROMOTED, WHICH,
            )  # fmt: skip
            low, high = finished(
                low, high, row_scale, of_low, of_high, low_bias, high_bias, out[1].index(0),
                PER_SCALE == 0, BY_FEATURE, bias_ptr is not None,
            )  # fmt: skip
            if GATED:
                act = hopper_activation(FORMULA, low, high, limit, alpha, beta)
                store_act(out, act, row, column, rows, I, ROUNDED, OWN, E8M0)
            else:
                low = plain_activation(FORMULA, low)
                store_act(out, low, row, column, rows, I, ROUNDED, OWN, E8M0)
                high = plain_activation(FORMULA, high)
                store_act(out, high, row, column + TILE_N, rows, I, ROUNDED, OWN, E8M0)
        else:
            stage, phase, turn = skip(
                bars, stage, phase, turns, turn, KSTEPS, rings[0].shape[0],
                PER_SCALE > 0 or PROMOTED == 1, WHICH,
            )  # fmt: skip
        number += 1
        word = read(box, number)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    out_desc,
    bias_ptr,
    x_ptr,
    x_scale_ptr,
    scale_ptr,
    act_scale_ptr,
    position_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counter_ptr,
    early_ptr,
    flags_ptr,
    state_ptr,
    error_ptr,
    stride_xs,
    stride_se,
    stride_sn,
    scale_shard_step,
    scale_row_step,
    scale_block,
    P,
    R,
    num_local,
    desc_rows,
    me,
    max_polls,
    limit,
    alpha,
    beta,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    WORLD: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    PROMOTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    BY_FEATURE: gl.constexpr,
    OWN: gl.constexpr,
    E8M0: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Descriptors as in ``hopper_prefill_up``. PROMOTED: products of so many steps are added to the
    sums at a time (0: all). PER_SCALE: so many steps share a scale of the weights; 0: all of them,
    and scales belong to weight rows (BY_FEATURE) or shards.
    act_scale_ptr: fp32 [I / 128, P], written (OWN), or one number, or None where act is 16-bit."""
    WIDE: gl.constexpr = TILE_N if GATED else 2 * TILE_N
    BELOW: gl.constexpr = 0 if GATED else TILE_N
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    ROUNDED: gl.constexpr = act_scale_ptr is not None
    rings, bars, out0, out1 = open_rings(low_desc, out_desc, STAGES, 128, PER_SCALE > 0)
    turns = open_turns(PER_SCALE > 0 or PROMOTED == 1)
    box = open_box(2, gl.int64)
    gdc_wait()
    gdc_launch_dependents()
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    arrivals = (early_ptr, flags_ptr, state_ptr, error_ptr, me, max_polls)
    sizes = (R, num_local, desc_rows)
    numbers = (limit, alpha, beta)
    scales = (scale_ptr, stride_se, stride_sn, scale_shard_step, scale_row_step, scale_block)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    (out_desc, out0, act_scale_ptr, P), box, bias_ptr, scales, rings, bars,
                    turns, numbers, H, I, FORMULA, GATED, INTERLEAVED, PROMOTED, PER_SCALE,
                    BY_FEATURE, ROUNDED, OWN, E8M0, WIDE, BELOW, 0,
                ),
            ),
            (
                up_consumer,
                (
                    (out_desc, out1, act_scale_ptr, P), box, bias_ptr, scales, rings, bars,
                    turns, numbers, H, I, FORMULA, GATED, INTERLEAVED, PROMOTED, PER_SCALE,
                    BY_FEATURE, ROUNDED, OWN, E8M0, WIDE, BELOW, 1,
                ),
            ),
            (
                up_producer,
                (
                    (low_desc, high_desc), box, counter_ptr, rings, bars, (x_ptr, H, None),
                    (x_scale_ptr, stride_xs), position_ptr, tables, arrivals, sizes, H, PICKS,
                    WORLD, TILES, WIDE, BELOW, GROUP, PER_SCALE > 0,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip
