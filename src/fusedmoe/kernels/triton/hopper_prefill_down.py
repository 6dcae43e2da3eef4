"""The second launch of ``hopper_prefill``: act [P, I], w2 -> y [P, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import Tables, next_stage
from fusedmoe.kernels.triton.hopper_drawn import draw, open_box
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    announce_half,
    expect_step,
    is_whole,
    open_ring,
    place,
    tiles_of,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_prefill_consumer import consumer

UNSPECIALIZED = ("R", "num_local", "picks_at", "share")


@gluon.jit
def down_producer(act_desc, w_desc, box, counter_ptr, ring, tables, CASE: gl.constexpr):
    STAGES: gl.constexpr = ring.rows.shape[0]
    BK: gl.constexpr = ring.rows.shape[2]
    KSTEPS: gl.constexpr = (CASE.D + BK - 1) // BK
    TILES: gl.constexpr = tiles_of(CASE)
    blocks = gl.load(tables.num_post) // BLOCK_M
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(STAGES, KSTEPS)
    first = gl.program_id(0)
    if first < blocks * TILES:
        block, tile, expert = place(first, blocks, tables, CASE)
        weight_row = expert * CASE.N + tile * wide_of(CASE)
        whole = is_whole(block, tables)
        for stage in gl.static_range(EARLY):
            bar = ring.full.index(stage)
            expect_step(bar, whole, 2 * BK)
            tma_load(w_desc, [weight_row, stage * BK], bar, ring.weights.index(stage))
    gdc_wait()
    gdc_launch_dependents()
    stage = 0
    phase = 1
    number = 0
    task = first
    tasks = blocks * TILES
    coming = tasks
    while task < tasks:
        block, tile, expert = place(task, blocks, tables, CASE)
        weight_row = expert * CASE.N + tile * wide_of(CASE)
        row = block * BLOCK_M
        whole = is_whole(block, tables)
        announce_half(box, number, block * TILES + tile, whole)
        number += 1
        for k in range(KSTEPS):
            if k == max(KSTEPS - STAGES, 0):  # a ring before the next task is begun
                coming = draw(counter_ptr, tables.R)
            mbarrier.wait(ring.empty.index(stage), phase)
            bar = ring.full.index(stage)
            if (task != first) | (k >= EARLY):
                expect_step(bar, whole, 2 * BK)
                tma_load(w_desc, [weight_row, k * BK], bar, ring.weights.index(stage))
            low = ring.rows.index(stage).slice(0, HALF_M, 0)
            high = ring.rows.index(stage).slice(HALF_M, HALF_M, 0)
            tma_load(act_desc, [row, k * BK], bar, low)
            tma_load(act_desc, [row + HALF_M, k * BK], bar, high, pred=whole)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce_half(box, number, tasks, False)


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
    CASE: gl.constexpr,
):
    """``act_desc`` views tiles of 64 rows. With ``bases_ptr`` rows are pushed to the tokens' ranks
    instead of stored: int64 [ranks], see ``hopper_pushed``."""
    ring, out0, out1 = open_ring(w_desc, CASE.STAGES, 0)
    box = open_box(2)
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)
    push = (bases_ptr, picks_at, share)
    gl.warp_specialize(
        [
            (consumer, (out_desc, out0, box, bias_ptr, ring, tables, (), push, CASE, 0)),
            (consumer, (out_desc, out1, box, bias_ptr, ring, tables, (), push, CASE, 1)),
            (down_producer, (act_desc, w_desc, box, counter_ptr, ring, tables, CASE)),
        ],
        [4, 1],
        [232, 40],
    )
