"""The first launch of ``hopper_mixed_prefill``: x [T, H], w1 -> act [P, I], and position [R]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from fusedmoe.kernels.triton.hopper_common import Tables, next_stage, rows_layout
from fusedmoe.kernels.triton.hopper_drawn import announce, draw, open_box
from fusedmoe.kernels.triton.hopper_mixed_numbers import STEP
from fusedmoe.kernels.triton.hopper_mixed_prefill_common import (
    blocks_of,
    bytes_of_stage,
    find_task,
    kind_number,
    load_words,
    open_ring,
    tiles_of,
    wait_at_the_end,
    wait_for_previous,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_mixed_prefill_consumer import Common, run_warps
from fusedmoe.kernels.triton.hopper_mixed_scales import Weights
from fusedmoe.kernels.triton.hopper_prefill_up import Source, gather, rows_at

UNSPECIALIZED = (
    "scale_shard_step", "scale_row_step", "scale_block", "R", "num_local", "desc_rows",
)  # fmt: skip


@gluon.jit
def up_producer(descs, box, counter_ptr, ring, source, tables, desc_rows, CASE: gl.constexpr):
    """Words of weights by TMA, rows of x by cp.async."""
    STEPS: gl.constexpr = CASE.STEPS
    KSTEPS: gl.constexpr = (CASE.D + STEP - 1) // STEP
    layout: gl.constexpr = rows_layout(STEP, gl.num_warps())
    row = gl.arange(0, CASE.SLOTS, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, layout)), 0)
    first_block, blocks = blocks_of(tables, CASE)
    stage = 0
    phase = 1
    number = 0
    task = gl.program_id(0)
    tasks = blocks * tiles_of(CASE)
    coming = tasks
    while task < tasks:
        at, block, tile, expert = find_task(task, first_block, blocks, tables, CASE)
        kind = kind_number(tables, block, CASE.SLOTS)
        announce(box, number, 4 * at + kind)
        number += 1
        weight_row = expert * desc_rows + tile * wide_of(CASE)
        place = block * CASE.SLOTS + row
        x_rows, lives = rows_at(place, tile == 0, source, tables, CASE.PICKS)
        for k in range(0, KSTEPS, STEPS):
            if k == KSTEPS // 2 // STEPS * STEPS:  # early enough for its latency, no earlier
                coming = draw(counter_ptr, tables.R)
            mbarrier.wait(ring.empty.index(stage), phase)
            bar = ring.full.index(stage)
            mbarrier.expect(bar, bytes_of_stage(ring.words.shape, CASE))
            load_words(descs, ring, stage, weight_row, k, CASE)
            for step in gl.static_range(STEPS):
                part = ring.rows.index(stage * STEPS + step)
                if KSTEPS % STEPS == 0 or k + step < KSTEPS:
                    gather(part, x_rows, lives, (k + step) * STEP + column, CASE.D, STEP)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, CASE.STAGES)
        task = coming
    announce(box, number, 4 * tasks)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    out_desc,
    scale_ptr,
    zero_ptr,
    scale2_ptr,
    bias_ptr,
    x_ptr,
    position_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counter_ptr,
    stride_x,
    stride_se,
    scale_shard_step,
    scale_row_step,
    scale_block,
    R,
    num_local,
    desc_rows,
    limit,
    alpha,
    beta,
    CASE: gl.constexpr,
):
    """low_desc, high_desc: words of gate and of up, or w1 twice, with ``desc_rows`` rows for each
    expert."""
    ring, out = open_ring(low_desc, out_desc, 128, CASE)
    box = open_box(CASE.ROWS // 64)
    wait_for_previous(CASE)
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)
    weights = Weights(
        *(scale_ptr, zero_ptr, scale2_ptr, bias_ptr),
        *(stride_se, scale_shard_step, scale_row_step, scale_block),
    )
    common = Common(out_desc, box, ring, weights, tables, (limit, alpha, beta))
    descs = (low_desc, high_desc)
    source = Source(x_ptr, stride_x, position_ptr)
    given = (descs, box, counter_ptr, ring, source, tables, desc_rows)
    run_warps(common, out, up_producer, given, 4, CASE)
    wait_at_the_end(CASE)
