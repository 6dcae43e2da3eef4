"""The second launch of ``hopper_mixed_prefill``: act [P, I], w2 -> y [P, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import next_stage, tile_of
from fusedmoe.kernels.triton.hopper_drawn import announce, draw, hear, open_box
from fusedmoe.kernels.triton.hopper_mixed_multiply import (
    multiply,
    rows_of,
)
from fusedmoe.kernels.triton.hopper_mixed_numbers import STEP, loads_of_stage
from fusedmoe.kernels.triton.hopper_mixed_prefill_common import (
    blocks_of,
    expert_of,
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
def down_producer(descs, act_desc, drawn, rings, bars, tables, num_local, PROBLEM: gl.constexpr):
    """One warp: words of weights and rows of act."""
    H, I, ELEMENT, _, TILES, GROUP_M, ROWS, STEPS, SHARE = PROBLEM  # noqa: E741
    box, counter_ptr, R = drawn
    w_ring, x_ring = rings
    full, empty = bars
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    STAGES: gl.constexpr = full.shape[0]
    SLOTS: gl.constexpr = x_ring.shape[1]
    HALF: gl.constexpr = w_ring.shape[1] // 2
    UNIT: gl.constexpr = unit_of(SLOTS)
    LOADS: gl.constexpr = loads_of_stage(ELEMENT, STEPS)
    WORDS: gl.constexpr = LOADS * w_ring.shape[1] * w_ring.shape[2] * 4
    X_BYTES: gl.constexpr = STEPS * SLOTS * STEP * 2
    KSTEPS: gl.constexpr = (I + STEP - 1) // STEP
    first_block, blocks = blocks_of(num_post_ptr, SLOTS, SHARE)
    tasks = blocks * TILES
    first = gl.program_id(0)
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(STAGES, (KSTEPS + STEPS - 1) // STEPS)
    if first < tasks:
        block, tile = tile_of(first, blocks, TILES, GROUP_M)
        block += first_block
        kind = kind_number(sorted_ptr, block, R, SLOTS)
        whole = (SLOTS != 128) | (kind == 0)
        weight_row = expert_of(expert_ids_ptr, block, num_local, SHARE) * H + tile * ROWS
        for stage in gl.static_range(EARLY):
            bar = full.index(stage)
            expect_stage(bar, whole, WORDS, X_BYTES, SLOTS)
            first_step = stage * STEPS
            load_words(descs, w_ring, stage, bar, weight_row, HALF, first_step, ELEMENT, STEPS)
    wait_for_previous(SHARE)
    stage = 0
    phase = 1
    number = 0
    task = first
    coming = tasks
    while task < tasks:
        block, tile = tile_of(task, blocks, TILES, GROUP_M)
        block += first_block
        kind = kind_number(sorted_ptr, block, R, SLOTS)
        whole = (SLOTS != 128) | (kind == 0)
        announce(box, number, 4 * task + kind)
        number += 1
        weight_row = expert_of(expert_ids_ptr, block, num_local, SHARE) * H + tile * ROWS
        for k in range(0, KSTEPS, STEPS):
            if k == KSTEPS // 2 // STEPS * STEPS:
                coming = draw(counter_ptr, R)
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if (task != first) | (k >= EARLY * STEPS):
                expect_stage(bar, whole, WORDS, X_BYTES, SLOTS)
                load_words(descs, w_ring, stage, bar, weight_row, HALF, k, ELEMENT, STEPS)
            for step in gl.static_range(STEPS):
                part = x_ring.index(stage * STEPS + step)
                column = (k + step) * STEP
                tma_load(act_desc, [block * SLOTS, column], bar, part.slice(0, UNIT, 0))
                if UNIT < SLOTS:
                    rest = part.slice(UNIT, UNIT, 0)
                    tma_load(act_desc, [block * SLOTS + UNIT, column], bar, rest, pred=whole)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce(box, number, 4 * tasks)
    wait_at_the_end(SHARE)


@gluon.jit
def finish_product(
    out_desc, buffers, acc, pointers, scales, expert, row, tile, INDEX: gl.constexpr,
    PROBLEM: gl.constexpr,
):  # fmt: skip
    """Scales, biases and store of one product's sums, or a part of them."""
    H, I, ELEMENT, GROUP, _, _, ROWS, _, _ = PROBLEM  # noqa: E741
    scale_ptr, _, scale2_ptr, bias_ptr = pointers
    first = rows_of(tile, INDEX, ROWS, False)
    low, high = finished(
        acc, scale_ptr, scale2_ptr, bias_ptr, scales, (0, 1), expert, first, H, I, ELEMENT, GROUP,
        False,
    )  # fmt: skip
    store_side(out_desc, buffers, low, row, first[0], 0, False)
    store_side(out_desc, buffers, high, row, first[1], 1, False)


@gluon.jit
def down_tile(
    out_desc, buffers, common, stage, phase, expert, row, tile, KIND: gl.constexpr,
    PROBLEM: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Product number WHICH of a tile, of a block's places from ``row`` on; KIND is a number."""
    pointers, scales, rings, bars, _, _ = common
    H, I, ELEMENT, GROUP, _, _, ROWS, STEPS, _ = PROBLEM  # noqa: E741
    FIRST: gl.constexpr = first_of(rings[1].shape[1], KIND)
    REST: gl.constexpr = rest_of(rings[1].shape[1], KIND)
    scale_ptr, zero_ptr, _, _ = pointers
    groups = group_pointers(
        scale_ptr, zero_ptr, scales, expert, rows_of(tile, WHICH, ROWS, False), H, I, ELEMENT,
        GROUP, False,
    )  # fmt: skip
    sums, stage, phase = multiply(
        rings, bars, stage, phase, groups, FIRST, REST, I, ELEMENT, GROUP, False, WHICH, STEPS
    )
    tma.store_wait(0)  # what the tile before stored has left its buffers long ago
    for part in gl.static_range(len(sums)):
        finish_product(
            out_desc, buffers, sums[part], pointers, scales, expert, row + part * FIRST, tile,
            WHICH, PROBLEM,
        )  # fmt: skip
    return stage, phase


@gluon.jit
def down_consumer(out_desc, buffers, box, common, PROBLEM: gl.constexpr, WHICH: gl.constexpr):
    """Product number WHICH of every tile."""
    _, _, rings, _, tables, num_local = common
    _, _, _, _, TILES, GROUP_M, _, _, SHARE = PROBLEM
    expert_ids_ptr, _, num_post_ptr = tables
    SLOTS: gl.constexpr = rings[1].shape[1]
    first_block, blocks = blocks_of(num_post_ptr, SLOTS, SHARE)
    stage = 0
    phase = 0
    number = 0
    word = hear(box, number)
    while word // 4 < blocks * TILES:
        block, tile = tile_of(word // 4, blocks, TILES, GROUP_M)
        block += first_block
        expert = expert_of(expert_ids_ptr, block, num_local, SHARE)
        row = block * SLOTS
        if word % 4 == 0:
            stage, phase = down_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 0, PROBLEM, WHICH
            )
        elif number_of_kinds(SLOTS) == 2 or word % 4 == 1:
            stage, phase = down_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 1, PROBLEM, WHICH
            )
        else:
            stage, phase = down_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 2, PROBLEM, WHICH
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
    PROBLEM: gl.constexpr = (H, I, ELEMENT, GROUP, TILES, GROUP_M, ROWS, STEPS, SHARE)
    drawn = (box, counter_ptr, R)
    if ROWS == 128:
        gl.warp_specialize(
            [
                (down_consumer, (out_desc, out[0], box, common, PROBLEM, 0)),
                (down_consumer, (out_desc, out[1], box, common, PROBLEM, 1)),
                (
                    down_producer,
                    (descs, act_desc, drawn, rings, bars, tables, num_local, PROBLEM),
                ),
            ],
            [4, 1],
            [216, 72],
        )
    elif ROWS == 192:
        gl.warp_specialize(
            [
                (down_consumer, (out_desc, out[0], box, common, PROBLEM, 0)),
                (down_consumer, (out_desc, out[1], box, common, PROBLEM, 1)),
                (down_consumer, (out_desc, out[2], box, common, PROBLEM, 2)),
                (
                    down_producer,
                    (descs, act_desc, drawn, rings, bars, tables, num_local, PROBLEM),
                ),
            ],
            [4, 4, 1],
            [144, 144, 80],
        )
    else:
        gl.warp_specialize(
            [
                (down_consumer, (out_desc, out[0], box, common, PROBLEM, 0)),
                (down_consumer, (out_desc, out[1], box, common, PROBLEM, 1)),
                (down_consumer, (out_desc, out[2], box, common, PROBLEM, 2)),
                (down_consumer, (out_desc, out[3], box, common, PROBLEM, 3)),
                (
                    down_producer,
                    (descs, act_desc, drawn, rings, bars, tables, num_local, PROBLEM),
                ),
            ],
            [4, 4, 4, 1],
            [104, 104, 104, 64],
        )
