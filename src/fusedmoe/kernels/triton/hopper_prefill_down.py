"""The second launch of ``hopper_prefill``: act [P, I], w2 -> y [P, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import expert_at, known, next_stage, tile_of_run
from fusedmoe.kernels.triton.hopper_drawn import draw, open_box
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    announce_half,
    expect_step,
    halves,
    hear_half,
    is_whole,
    load_bias,
    multiply,
    open_rings,
    store_tile,
)
from fusedmoe.kernels.triton.hopper_pushed import lines_of, push_tile, slots_of_half

UNSPECIALIZED = ("R", "num_local", "picks_at", "share")


@gluon.jit
def find_task(
    task, blocks, expert_ids_ptr, num_local,
    H: gl.constexpr, TILES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """(block, column tile, row of the weights)."""
    block, tile, expert = tile_of_run(task, blocks, expert_ids_ptr, TILES, GROUP)
    return block, tile, known(expert, num_local) * H + tile * (2 * TILE_N)


@gluon.jit
def down_producer(
    descs,
    box,
    counter_ptr,
    rings,
    bars,
    tables,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
):
    a_ring, b_ring = rings
    full, empty = bars
    act_desc, w_desc = descs
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    STAGES: gl.constexpr = a_ring.shape[0]
    BK: gl.constexpr = a_ring.shape[2]
    KSTEPS: gl.constexpr = (I + BK - 1) // BK
    blocks = gl.load(num_post_ptr) // BLOCK_M
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(STAGES, KSTEPS)
    first = gl.program_id(0)
    if first < blocks * TILES:
        block, _, weight_row = find_task(first, blocks, expert_ids_ptr, num_local, H, TILES, GROUP)
        whole = is_whole(block, sorted_ptr, R)
        for stage in gl.static_range(EARLY):
            bar = full.index(stage)
            expect_step(bar, whole, 2 * BK)
            tma_load(w_desc, [weight_row, stage * BK], bar, b_ring.index(stage))
    gdc_wait()
    gdc_launch_dependents()
    stage = 0
    phase = 1
    number = 0
    task = first
    tasks = blocks * TILES
    coming = tasks
    while task < tasks:
        block, tile, weight_row = find_task(
            task, blocks, expert_ids_ptr, num_local, H, TILES, GROUP
        )
        row = block * BLOCK_M
        whole = is_whole(block, sorted_ptr, R)
        announce_half(box, number, block * TILES + tile, whole)
        number += 1
        for k in range(KSTEPS):
            if k == max(KSTEPS - STAGES, 0):  # a ring before the next task is begun
                coming = draw(counter_ptr, R)
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if (task != first) | (k >= EARLY):
                expect_step(bar, whole, 2 * BK)
                tma_load(w_desc, [weight_row, k * BK], bar, b_ring.index(stage))
            low = a_ring.index(stage).slice(0, HALF_M, 0)
            high = a_ring.index(stage).slice(HALF_M, HALF_M, 0)
            tma_load(act_desc, [row, k * BK], bar, low)
            tma_load(act_desc, [row + HALF_M, k * BK], bar, high, pred=whole)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce_half(box, number, tasks, False)


@gluon.jit
def down_consumer(
    out_desc,
    buffers,
    box,
    bias_ptr,
    rings,
    bars,
    tables,
    push,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
    WHICH: gl.constexpr,
):
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    bases_ptr, _, _ = push
    BK: gl.constexpr = rings[0].shape[2]
    KSTEPS: gl.constexpr = (I + BK - 1) // BK
    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 0
    number = 0
    at, live = hear_half(box, number, WHICH)
    while at < blocks * TILES:
        block, tile = at // TILES, at % TILES
        row = block * BLOCK_M + WHICH * HALF_M
        if bases_ptr is not None:
            slots = slots_of_half(sorted_ptr, row)
        acc, stage, phase = multiply(rings, bars, stage, phase, live, KSTEPS, WHICH)
        if live:
            low, high = halves(acc)
            column = tile * (2 * TILE_N)
            if bias_ptr is not None:
                expert = expert_at(expert_ids_ptr, block, num_local).to(gl.int64)
                bias = bias_ptr + expert * H + column
                low += load_bias(bias, 1, H - column)
                high += load_bias(bias + TILE_N, 1, H - column - TILE_N)
            if bases_ptr is None:
                store_tile(out_desc, buffers, low, row, column)
                store_tile(out_desc, buffers, high, row, column + TILE_N)
            else:
                lines, there = lines_of(push, slots, R, H, buffers.dtype)
                push_tile(lines, there, buffers, low, column, H)
                push_tile(lines, there, buffers, high, column + TILE_N, H)
        number += 1
        at, live = hear_half(box, number, WHICH)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    act_desc,
    w_desc,
    out_desc,
    bias_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counter_ptr,
    bases_ptr,
    R,
    num_local,
    picks_at,
    share,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """``act_desc`` views tiles of 64 rows. With ``bases_ptr`` rows are pushed to the tokens' ranks
    instead of stored: int64 [ranks], see ``hopper_pushed``."""
    TILES: gl.constexpr = (H + 2 * TILE_N - 1) // (2 * TILE_N)
    rings, bars, out0, out1 = open_rings(w_desc, BK, STAGES, 0)
    box = open_box(2)
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    push = (bases_ptr, picks_at, share)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (
                    out_desc, out0, box, bias_ptr, rings, bars, tables, push, R, num_local, H, I,
                    TILES, GROUP, 0,
                ),
            ),
            (
                down_consumer,
                (
                    out_desc, out1, box, bias_ptr, rings, bars, tables, push, R, num_local, H, I,
                    TILES, GROUP, 1,
                ),
            ),
            (
                down_producer,
                (
                    (act_desc, w_desc), box, counter_ptr, rings, bars, tables, R, num_local, H, I,
                    TILES, GROUP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
