"""The second launch of ``hopper_mixed_prefill``: act [P, I], w2 -> y [P, H]."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_drawn import announce, draw, hear, open_box
from fusedmoe.kernels.triton.hopper_mixed_multiply import (
    multiply,
    rows_of,
)
from fusedmoe.kernels.triton.hopper_mixed_numbers import STEP, loads_of_stage
from fusedmoe.kernels.triton.hopper_mixed_prefill_common import (
    blocks_of,
    expert_of,
    find_task,
    finished,
    first_of,
    kind_number,
    load_words,
    number_of_kinds,
    open_rings,
    rest_of,
    store_side,
    unit_of,
    wait_at_the_end,
    wait_for_previous,
)
from fusedmoe.kernels.triton.hopper_mixed_scales import group_pointers


class Case(NamedTuple):
    """What is constant in a launch. (A tuple taken apart would become numbers of run time.)"""

    H: gl.constexpr
    I: gl.constexpr  # noqa: E741
    ELEMENT: gl.constexpr
    GROUP: gl.constexpr
    TILES: gl.constexpr
    GROUP_M: gl.constexpr
    ROWS: gl.constexpr
    STEPS: gl.constexpr
    SHARE: gl.constexpr


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
def down_producer(descs, act_desc, drawn, rings, bars, tables, num_local, CASE: gl.constexpr):
    """One warp: words of weights and rows of act."""
    box, counter_ptr, R = drawn
    w_ring, x_ring = rings
    full, empty = bars
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    STAGES: gl.constexpr = full.shape[0]
    SLOTS: gl.constexpr = x_ring.shape[1]
    HALF: gl.constexpr = w_ring.shape[1] // 2
    UNIT: gl.constexpr = unit_of(SLOTS)
    LOADS: gl.constexpr = loads_of_stage(CASE.ELEMENT, CASE.STEPS)
    WORDS: gl.constexpr = LOADS * w_ring.shape[1] * w_ring.shape[2] * 4
    X_BYTES: gl.constexpr = CASE.STEPS * SLOTS * STEP * 2
    KSTEPS: gl.constexpr = (CASE.I + STEP - 1) // STEP
    first_block, blocks = blocks_of(num_post_ptr, SLOTS, CASE.SHARE)
    tasks = blocks * CASE.TILES
    first = gl.program_id(0)
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(STAGES, (KSTEPS + CASE.STEPS - 1) // CASE.STEPS)
    if first < tasks:
        _, block, tile, expert = find_task(
            first, first_block, blocks, expert_ids_ptr, num_local, CASE.TILES, CASE.GROUP_M,
            CASE.SHARE,
        )  # fmt: skip
        kind = kind_number(sorted_ptr, block, R, SLOTS)
        whole = (SLOTS != 128) | (kind == 0)
        weight_row = expert * CASE.H + tile * CASE.ROWS
        for stage in gl.static_range(EARLY):
            bar = full.index(stage)
            expect_stage(bar, whole, WORDS, X_BYTES, SLOTS)
            first_step = stage * CASE.STEPS
            load_words(
                descs, w_ring, stage, bar, weight_row, HALF, first_step, CASE.ELEMENT, CASE.STEPS
            )
    wait_for_previous(CASE.SHARE)
    stage = 0
    phase = 1
    number = 0
    task = first
    coming = tasks
    while task < tasks:
        at, block, tile, expert = find_task(
            task, first_block, blocks, expert_ids_ptr, num_local, CASE.TILES, CASE.GROUP_M,
            CASE.SHARE,
        )  # fmt: skip
        kind = kind_number(sorted_ptr, block, R, SLOTS)
        whole = (SLOTS != 128) | (kind == 0)
        announce(box, number, 4 * at + kind)
        number += 1
        weight_row = expert * CASE.H + tile * CASE.ROWS
        for k in range(0, KSTEPS, CASE.STEPS):
            if k == KSTEPS // 2 // CASE.STEPS * CASE.STEPS:
                coming = draw(counter_ptr, R)
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if (task != first) | (k >= EARLY * CASE.STEPS):
                expect_stage(bar, whole, WORDS, X_BYTES, SLOTS)
                load_words(descs, w_ring, stage, bar, weight_row, HALF, k, CASE.ELEMENT, CASE.STEPS)
            for step in gl.static_range(CASE.STEPS):
                part = x_ring.index(stage * CASE.STEPS + step)
                column = (k + step) * STEP
                tma_load(act_desc, [block * SLOTS, column], bar, part.slice(0, UNIT, 0))
                if UNIT < SLOTS:
                    rest = part.slice(UNIT, UNIT, 0)
                    tma_load(act_desc, [block * SLOTS + UNIT, column], bar, rest, pred=whole)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce(box, number, 4 * tasks)
    wait_at_the_end(CASE.SHARE)


@gluon.jit
def finish_product(
    out_desc, buffers, acc, pointers, scales, expert, row, tile, INDEX: gl.constexpr,
    CASE: gl.constexpr,
):  # fmt: skip
    """Scales, biases and store of one product's sums, or a part of them."""
    scale_ptr, _, scale2_ptr, bias_ptr = pointers
    first = rows_of(tile, INDEX, CASE.ROWS, False)
    low, high = finished(
        acc, scale_ptr, scale2_ptr, bias_ptr, scales, (0, 1), expert, first, CASE.H, CASE.I,
        CASE.ELEMENT, CASE.GROUP, False,
    )  # fmt: skip
    store_side(out_desc, buffers, low, row, first[0], 0, False)
    store_side(out_desc, buffers, high, row, first[1], 1, False)


@gluon.jit
def down_tile(
    out_desc, buffers, common, stage, phase, expert, row, tile, KIND: gl.constexpr,
    CASE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Product number WHICH of a tile, of a block's places from ``row`` on; KIND is a number."""
    pointers, scales, rings, bars, _, _ = common
    FIRST: gl.constexpr = first_of(rings[1].shape[1], KIND)
    REST: gl.constexpr = rest_of(rings[1].shape[1], KIND)
    scale_ptr, zero_ptr, _, _ = pointers
    groups = group_pointers(
        scale_ptr, zero_ptr, scales, expert, rows_of(tile, WHICH, CASE.ROWS, False), CASE.H, CASE.I,
        CASE.ELEMENT, CASE.GROUP, False,
    )  # fmt: skip
    sums, stage, phase = multiply(
        rings,
        bars,
        stage,
        phase,
        groups,
        FIRST,
        REST,
        CASE.I,
        CASE.ELEMENT,
        CASE.GROUP,
        False,
        WHICH,
        CASE.STEPS,
    )
    tma.store_wait(0)  # what the tile before stored has left its buffers long ago
    for part in gl.static_range(len(sums)):
        finish_product(
            out_desc, buffers, sums[part], pointers, scales, expert, row + part * FIRST, tile,
            WHICH, CASE,
        )  # fmt: skip
    return stage, phase


@gluon.jit
def down_consumer(out_desc, buffers, box, common, CASE: gl.constexpr, WHICH: gl.constexpr):
    """Product number WHICH of every tile."""
    _, _, rings, _, tables, num_local = common
    expert_ids_ptr, _, num_post_ptr = tables
    SLOTS: gl.constexpr = rings[1].shape[1]
    first_block, blocks = blocks_of(num_post_ptr, SLOTS, CASE.SHARE)
    stage = 0
    phase = 0
    number = 0
    word = hear(box, number)
    while word // 4 < blocks * CASE.TILES:
        block, tile = first_block + word // 4 // CASE.TILES, word // 4 % CASE.TILES
        expert = expert_of(expert_ids_ptr, block, num_local, CASE.SHARE)
        row = block * SLOTS
        if word % 4 == 0:
            stage, phase = down_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 0, CASE, WHICH
            )
        elif number_of_kinds(SLOTS) == 2 or word % 4 == 1:
            stage, phase = down_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 1, CASE, WHICH
            )
        else:
            stage, phase = down_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 2, CASE, WHICH
            )
        number += 1
        word = hear(box, number)
    tma.store_wait(0)


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
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    ELEMENT: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    STEPS: gl.constexpr,
    GROUP_M: gl.constexpr,
    SHARE: gl.constexpr,
):
    """As ``up_kernel``, of w2; both descriptors are the same."""
    TILES: gl.constexpr = (H + ROWS - 1) // ROWS
    LOADS: gl.constexpr = loads_of_stage(ELEMENT, STEPS)
    rings, bars, out = open_rings(low_desc, out_desc, SLOTS, ROWS, LOADS, STAGES, STEPS, 0, 2)
    box = open_box(ROWS // 64)
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    descs = (low_desc, high_desc)
    pointers = (scale_ptr, zero_ptr, scale2_ptr, bias_ptr)
    scales = (stride_se, 0, scale_row_step, scale_block)
    common = (pointers, scales, rings, bars, tables, num_local)
    CASE: gl.constexpr = Case(H, I, ELEMENT, GROUP, TILES, GROUP_M, ROWS, STEPS, SHARE)
    drawn = (box, counter_ptr, R)
    if ROWS == 128:
        gl.warp_specialize(
            [
                (down_consumer, (out_desc, out[0], box, common, CASE, 0)),
                (down_consumer, (out_desc, out[1], box, common, CASE, 1)),
                (
                    down_producer,
                    (descs, act_desc, drawn, rings, bars, tables, num_local, CASE),
                ),
            ],
            [4, 1],
            [216, 72],
        )
    elif ROWS == 192:
        gl.warp_specialize(
            [
                (down_consumer, (out_desc, out[0], box, common, CASE, 0)),
                (down_consumer, (out_desc, out[1], box, common, CASE, 1)),
                (down_consumer, (out_desc, out[2], box, common, CASE, 2)),
                (
                    down_producer,
                    (descs, act_desc, drawn, rings, bars, tables, num_local, CASE),
                ),
            ],
            [4, 4, 1],
            [144, 144, 80],
        )
    else:
        gl.warp_specialize(
            [
                (down_consumer, (out_desc, out[0], box, common, CASE, 0)),
                (down_consumer, (out_desc, out[1], box, common, CASE, 1)),
                (down_consumer, (out_desc, out[2], box, common, CASE, 2)),
                (down_consumer, (out_desc, out[3], box, common, CASE, 3)),
                (
                    down_producer,
                    (descs, act_desc, drawn, rings, bars, tables, num_local, CASE),
                ),
            ],
            [4, 4, 4, 1],
            [104, 104, 104, 64],
        )
