"""The producer of ``hopper_fp8_prefill_up``: rows, weights and scales into the rings."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from fusedmoe.kernels.triton.gluon_names import cp_async, tma_load
from fusedmoe.kernels.triton.hopper_arrivals import await_rows
from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_drawn import announce, clear, draw, post
from fusedmoe.kernels.triton.hopper_fp8_prefill_common import (
    NO_TASK,
    ONE_EACH,
    STEP,
    filled,
    load_weight_scales,
    packed,
    place,
)
from fusedmoe.kernels.triton.hopper_prefill_common import BLOCK_M, HALF_M, TILE_N
from fusedmoe.kernels.triton.hopper_prefill_up import gather, rows_at


@gluon.jit
def up_producer(
    descs,
    box,
    counter_ptr,
    rings,
    bars,
    x,
    x_scales,
    weight_scale_ptr,
    position_ptr,
    tables,
    arrivals,
    sizes,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    WORLD: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
    STEPPED: gl.constexpr,
    FEATURES: gl.constexpr,
):
    """As ``hopper_prefill_up.up_producer``, of bytes. Scales of rows go into their ring with each
    step if STEPPED; else with each word in the box, and if FEATURES those of weight rows do, too:
    consumers need not exchange them."""
    a_ring, b_ring, scale_ring = rings[0], rings[1], rings[2]
    full, empty = bars
    x_scale_ptr, stride_xs = x_scales
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, desc_rows = sizes
    STAGES: gl.constexpr = a_ring.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, layout)), 0)

    SHARDS: gl.constexpr = 2 if GATED else 1
    BY: gl.constexpr = 2 if INTERLEAVED else 1
    TO_HIGH: gl.constexpr = (1 if INTERLEAVED else I) if GATED else TILE_N

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
            if FEATURES:
                of_low, of_high = load_weight_scales(
                    weight_scale_ptr, expert, tile * WIDE, BELOW, BY, TO_HIGH, SHARDS, I, True
                )
            clear(box, number)
            scale_ring.index(number % 2).store(row_scale)
            if FEATURES:
                features = rings[3].index(number % 2)
                features.slice(0, TILE_N).store(of_low)
                features.slice(TILE_N, TILE_N).store(of_high)
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
