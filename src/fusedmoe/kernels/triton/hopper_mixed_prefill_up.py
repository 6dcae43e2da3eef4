"""The first launch of ``hopper_mixed_prefill``: x [T, H], w1 -> act [P, I], and position [R]."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import (
    hopper_activation,
    next_stage,
    rows_layout,
)
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
    wait_at_the_end,
    wait_for_previous,
)
from fusedmoe.kernels.triton.hopper_mixed_scales import group_pointers
from fusedmoe.kernels.triton.hopper_prefill_up import gather, rows_at


class Case(NamedTuple):
    """What is constant in a launch. (A tuple taken apart would become numbers of run time.)"""

    H: gl.constexpr
    I: gl.constexpr  # noqa: E741
    ELEMENT: gl.constexpr
    GROUP: gl.constexpr
    FORMULA: gl.constexpr
    GATED: gl.constexpr
    TILES: gl.constexpr
    GROUP_M: gl.constexpr
    ROWS: gl.constexpr
    STEPS: gl.constexpr
    ORDERED: gl.constexpr
    SHARE: gl.constexpr


UNSPECIALIZED = (
    "scale_shard_step", "scale_row_step", "scale_block", "R", "num_local", "desc_rows",
)  # fmt: skip


@gluon.jit
def up_producer(
    descs, drawn, rings, bars, x, position_ptr, tables, sizes, WIDE: gl.constexpr,
    PICKS: gl.constexpr, CASE: gl.constexpr,
):  # fmt: skip
    """Words of weights by TMA, rows of x by cp.async."""
    box, counter_ptr = drawn
    w_ring, x_ring = rings
    full, empty = bars
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, desc_rows = sizes
    STAGES: gl.constexpr = full.shape[0]
    SLOTS: gl.constexpr = x_ring.shape[1]
    LOADS: gl.constexpr = loads_of_stage(CASE.ELEMENT, CASE.STEPS)
    BYTES: gl.constexpr = LOADS * w_ring.shape[1] * w_ring.shape[2] * 4
    BELOW: gl.constexpr = 0 if CASE.GATED else w_ring.shape[1] // 2
    KSTEPS: gl.constexpr = (CASE.H + STEP - 1) // STEP
    layout: gl.constexpr = rows_layout(SLOTS, STEP, gl.num_warps())
    row = gl.arange(0, SLOTS, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, layout)), 0)
    first_block, blocks = blocks_of(num_post_ptr, SLOTS, CASE.SHARE)
    stage = 0
    phase = 1
    number = 0
    task = gl.program_id(0)
    tasks = blocks * CASE.TILES
    coming = tasks
    while task < tasks:
        at, block, tile, expert = find_task(
            task, first_block, blocks, expert_ids_ptr, num_local, CASE.TILES, CASE.GROUP_M,
            CASE.SHARE,
        )  # fmt: skip
        kind = kind_number(sorted_ptr, block, R, SLOTS)
        announce(box, number, 4 * at + kind)
        number += 1
        weight_row = expert * desc_rows + tile * WIDE
        place = block * SLOTS + row
        x_rows, lives = rows_at(place, tile == 0, x, position_ptr, sorted_ptr, R, PICKS)
        for k in range(0, KSTEPS, CASE.STEPS):
            if (
                k == KSTEPS // 2 // CASE.STEPS * CASE.STEPS
            ):  # early enough for its latency, no earlier
                coming = draw(counter_ptr, R)
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            load_words(descs, w_ring, stage, bar, weight_row, BELOW, k, CASE.ELEMENT, CASE.STEPS)
            for step in gl.static_range(CASE.STEPS):
                part = x_ring.index(stage * CASE.STEPS + step)
                if KSTEPS % CASE.STEPS == 0 or k + step < KSTEPS:
                    gather(part, x_rows, lives, (k + step) * STEP + column, CASE.H, STEP)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce(box, number, 4 * tasks)


@gluon.jit
def finish_product(
    out_desc, buffers, acc, pointers, scales, bias_steps, expert, row, tile, numbers,
    PART: gl.constexpr, INDEX: gl.constexpr, CASE: gl.constexpr,
):  # fmt: skip
    """Scales, biases, activation and store of one product's sums, or a part of them."""
    scale_ptr, _, scale2_ptr, bias_ptr = pointers
    limit, alpha, beta = numbers
    first = rows_of(tile, INDEX, CASE.ROWS, CASE.GATED)
    low, high = finished(
        acc, scale_ptr, scale2_ptr, bias_ptr, scales, bias_steps, expert, first, CASE.I,
        CASE.H, CASE.ELEMENT, CASE.GROUP, CASE.GATED,
    )  # fmt: skip
    if CASE.GATED:
        act = hopper_activation(CASE.FORMULA, low, high, limit, alpha, beta)
        store_side(out_desc, buffers, act, row, first[0], PART, CASE.ORDERED)
    else:
        store_side(
            out_desc, buffers, plain_activation(CASE.FORMULA, low), row, first[0], 0, CASE.ORDERED
        )
        store_side(
            out_desc, buffers, plain_activation(CASE.FORMULA, high), row, first[1], 1, CASE.ORDERED
        )


@gluon.jit
def up_tile(
    out_desc, buffers, common, stage, phase, expert, row, tile, KIND: gl.constexpr,
    CASE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Product number WHICH of a tile, of a block's places from ``row`` on; KIND is a number."""
    pointers, scales, bias_steps, rings, bars, _, _, numbers = common
    FIRST: gl.constexpr = first_of(rings[1].shape[1], KIND)
    REST: gl.constexpr = rest_of(rings[1].shape[1], KIND)
    scale_ptr, zero_ptr, _, _ = pointers
    groups = group_pointers(
        scale_ptr, zero_ptr, scales, expert, rows_of(tile, WHICH, CASE.ROWS, CASE.GATED),
        CASE.I, CASE.H, CASE.ELEMENT, CASE.GROUP, CASE.GATED,
    )  # fmt: skip
    sums, stage, phase = multiply(
        rings,
        bars,
        stage,
        phase,
        groups,
        FIRST,
        REST,
        CASE.H,
        CASE.ELEMENT,
        CASE.GROUP,
        CASE.GATED,
        WHICH,
        CASE.STEPS,
    )
    tma.store_wait(0)  # what the tile before stored has left its buffers long ago
    for part in gl.static_range(len(sums)):
        finish_product(
            out_desc, buffers, sums[part], pointers, scales, bias_steps, expert,
            row + part * FIRST, tile, numbers, part, WHICH, CASE,
        )  # fmt: skip
    return stage, phase


@gluon.jit
def up_consumer(out_desc, buffers, box, common, CASE: gl.constexpr, WHICH: gl.constexpr):
    """Product number WHICH of every tile."""
    _, _, _, rings, _, tables, num_local, _ = common
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
            stage, phase = up_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 0, CASE, WHICH
            )
        elif number_of_kinds(SLOTS) == 2 or word % 4 == 1:
            stage, phase = up_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 1, CASE, WHICH
            )
        else:
            stage, phase = up_tile(
                out_desc, buffers, common, stage, phase, expert, row, tile, 2, CASE, WHICH
            )
        number += 1
        word = hear(box, number)
    tma.store_wait(0)


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
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    ELEMENT: gl.constexpr,
    GROUP: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    ORDERED: gl.constexpr,
    ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    STEPS: gl.constexpr,
    GROUP_M: gl.constexpr,
    SHARE: gl.constexpr,
):
    """low_desc, high_desc: words of gate and of up, or w1 twice, with ``desc_rows`` rows for each
    expert. GROUP columns share a scale (0: a row does)."""
    WIDE: gl.constexpr = ROWS // 2 if GATED else ROWS
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    LOADS: gl.constexpr = loads_of_stage(ELEMENT, STEPS)
    rings, bars, out = open_rings(
        low_desc, out_desc, SLOTS, ROWS, LOADS, STAGES, STEPS, 128, 1 if GATED else 2
    )
    box = open_box(ROWS // 64)
    wait_for_previous(SHARE)
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    sizes = (R, num_local, desc_rows)
    descs = (low_desc, high_desc)
    x = (x_ptr, stride_x, None)
    numbers = (limit, alpha, beta)
    pointers = (scale_ptr, zero_ptr, scale2_ptr, bias_ptr)
    scales = (stride_se, scale_shard_step, scale_row_step, scale_block)
    TO_UP: gl.constexpr = 1 if INTERLEAVED else I
    bias_steps = (TO_UP, 2 if INTERLEAVED else 1)
    common = (pointers, scales, bias_steps, rings, bars, tables, num_local, numbers)
    CASE: gl.constexpr = Case(
        H, I, ELEMENT, GROUP, FORMULA, GATED, TILES, GROUP_M, ROWS, STEPS, ORDERED, SHARE,
    )  # fmt: skip
    drawn = (box, counter_ptr)
    if ROWS == 128:
        gl.warp_specialize(
            [
                (up_consumer, (out_desc, out[0], box, common, CASE, 0)),
                (up_consumer, (out_desc, out[1], box, common, CASE, 1)),
                (
                    up_producer,
                    (
                        descs, drawn, rings, bars, x, position_ptr, tables, sizes, WIDE, PICKS,
                        CASE,
                    ),
                ),
            ],
            [4, 4],
            [216, 72],
        )  # fmt: skip
    elif ROWS == 192:
        gl.warp_specialize(
            [
                (up_consumer, (out_desc, out[0], box, common, CASE, 0)),
                (up_consumer, (out_desc, out[1], box, common, CASE, 1)),
                (up_consumer, (out_desc, out[2], box, common, CASE, 2)),
                (
                    up_producer,
                    (
                        descs, drawn, rings, bars, x, position_ptr, tables, sizes, WIDE, PICKS,
                        CASE,
                    ),
                ),
            ],
            [4, 4, 4],
            [144, 144, 80],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (up_consumer, (out_desc, out[0], box, common, CASE, 0)),
                (up_consumer, (out_desc, out[1], box, common, CASE, 1)),
                (up_consumer, (out_desc, out[2], box, common, CASE, 2)),
                (up_consumer, (out_desc, out[3], box, common, CASE, 3)),
                (
                    up_producer,
                    (
                        descs, drawn, rings, bars, x, position_ptr, tables, sizes, WIDE, PICKS,
                        CASE,
                    ),
                ),
            ],
            [4, 4, 4, 4],
            [104, 104, 104, 64],
        )  # fmt: skip
    wait_at_the_end(SHARE)
