"""The second launch of ``hopper_mixed_prefill``: act [P, I], w2 -> y [P, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import Tables, next_stage
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
    unit_of,
    wait_at_the_end,
    wait_for_previous,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_mixed_prefill_consumer import Common, run_warps
from fusedmoe.kernels.triton.hopper_mixed_scales import Weights

UNSPECIALIZED = ("scale_row_step", "scale_block", "R", "num_local")


@gluon.jit
def expect_stage(bar, whole, WORDS: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr):
    """WORDS bytes of weights, and ROWS bytes of act or, of a block that is not whole, the part of
    them that its first unit has; those of 256 are."""
    if SLOTS != 128:
        mbarrier.expect(bar, WORDS + ROWS)
    else:
        mbarrier.expect(bar, WORDS + ROWS, pred=whole)
        mbarrier.expect(bar, WORDS + ROWS // SLOTS * unit_of(SLOTS), pred=~whole)


@gluon.jit
def down_producer(descs, act_desc, box, counter_ptr, ring, tables, CASE: gl.constexpr):
    """One warp: words of weights and rows of act."""
    SLOTS: gl.constexpr = CASE.SLOTS
    STEPS: gl.constexpr = CASE.STEPS
    UNIT: gl.constexpr = unit_of(SLOTS)
    WORDS: gl.constexpr = bytes_of_stage(ring.words.shape, CASE)
    X_BYTES: gl.constexpr = STEPS * SLOTS * STEP * 2
    KSTEPS: gl.constexpr = (CASE.D + STEP - 1) // STEP
    first_block, blocks = blocks_of(tables, CASE)
    tasks = blocks * tiles_of(CASE)
    first = gl.program_id(0)
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(CASE.STAGES, (KSTEPS + STEPS - 1) // STEPS)
    if first < tasks:
        _, block, tile, expert = find_task(first, first_block, blocks, tables, CASE)
        kind = kind_number(tables, block, SLOTS)
        whole = (SLOTS != 128) | (kind == 0)
        weight_row = expert * CASE.N + tile * wide_of(CASE)
        for stage in gl.static_range(EARLY):
            expect_stage(ring.full.index(stage), whole, WORDS, X_BYTES, SLOTS)
            load_words(descs, ring, stage, weight_row, stage * STEPS, CASE)
    wait_for_previous(CASE)
    stage = 0
    phase = 1
    number = 0
    task = first
    coming = tasks
    while task < tasks:
        at, block, tile, expert = find_task(task, first_block, blocks, tables, CASE)
        kind = kind_number(tables, block, SLOTS)
        whole = (SLOTS != 128) | (kind == 0)
        announce(box, number, 4 * at + kind)
        number += 1
        weight_row = expert * CASE.N + tile * wide_of(CASE)
        for k in range(0, KSTEPS, STEPS):
            if k == KSTEPS // 2 // STEPS * STEPS:
                coming = draw(counter_ptr, tables.R)
            mbarrier.wait(ring.empty.index(stage), phase)
            bar = ring.full.index(stage)
            if (task != first) | (k >= EARLY * STEPS):
                expect_stage(bar, whole, WORDS, X_BYTES, SLOTS)
                load_words(descs, ring, stage, weight_row, k, CASE)
            for step in gl.static_range(STEPS):
                part = ring.rows.index(stage * STEPS + step)
                column = (k + step) * STEP
                tma_load(act_desc, [block * SLOTS, column], bar, part.slice(0, UNIT, 0))
                if UNIT < SLOTS:
                    rest = part.slice(UNIT, UNIT, 0)
                    tma_load(act_desc, [block * SLOTS + UNIT, column], bar, rest, pred=whole)
            stage, phase = next_stage(stage, phase, CASE.STAGES)
        task = coming
    announce(box, number, 4 * tasks)
    wait_at_the_end(CASE)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    low_desc,
    high_desc,
    act_desc,
    out_desc,
    scale_ptr,
    zero_ptr,
    scale2_ptr,
    bias_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counter_ptr,
    stride_se,
    scale_row_step,
    scale_block,
    R,
    num_local,
    CASE: gl.constexpr,
):
    """As ``up_kernel``, of w2; both descriptors are the same."""
    ring, out = open_ring(low_desc, out_desc, 0, CASE)
    box = open_box(CASE.ROWS // 64)
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)
    weights = Weights(
        *(scale_ptr, zero_ptr, scale2_ptr, bias_ptr),
        *(stride_se, 0, scale_row_step, scale_block),
    )
    common = Common(out_desc, box, ring, weights, tables, ())
    descs = (low_desc, high_desc)
    given = (descs, act_desc, box, counter_ptr, ring, tables)
    run_warps(common, out, down_producer, given, 1, CASE)
