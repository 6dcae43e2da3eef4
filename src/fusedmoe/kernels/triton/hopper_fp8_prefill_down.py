"""The second launch of ``hopper_fp8_prefill``: quantized act [P, I], w2 -> y [P, H]."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import cp_async, tma_load
from fusedmoe.kernels.triton.hopper_common import Scales, Tables, next_stage
from fusedmoe.kernels.triton.hopper_drawn import (
    announce,
    draw,
    hear,
    open_box,
)
from fusedmoe.kernels.triton.hopper_fp8_prefill_common import (
    NO_TASK,
    expect_step,
    filled,
    open_ring,
    packed,
    tile_sums,
    unpacked,
)
from fusedmoe.kernels.triton.hopper_fp8_prefill_multiply import BY_ROW, STEP, skip, steps_of
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    place,
    store_tile,
    tiles_of,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_pushed import lines_of, push_tile, slots_of_half

UNSPECIALIZED = (
    "stride_am", "scale_blocks", "stride_se", "stride_sn", "scale_row_step", "scale_block", "R",
    "num_local", "picks_at", "share",
)  # fmt: skip


class ActScales(NamedTuple):
    """One number, or one per row, ``stride`` apart; STEPPED: [I / 128, 128 * blocks]."""

    pointer: gl.tensor
    stride: gl.tensor
    blocks: gl.tensor


@gluon.jit
def down_producer(act_desc, w_desc, box, counter_ptr, act_scales, ring, tables, CASE: gl.constexpr):
    """As ``hopper_prefill_down.down_producer``, of bytes."""
    BOX: gl.constexpr = act_desc.block_shape[0]
    row = gl.arange(0, BLOCK_M, gl.BlockedLayout([4], [32], [1], [0]))
    KSTEPS: gl.constexpr = steps_of(CASE)
    TILES: gl.constexpr = tiles_of(CASE)
    blocks = gl.load(tables.num_post) // BLOCK_M
    tasks = blocks * TILES
    first = gl.program_id(0)
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(CASE.STAGES, KSTEPS)
    if first < tasks:
        block, tile, expert = place(first, blocks, tables, CASE)
        n = filled(block, tables)
        weight_row = expert * CASE.N + tile * wide_of(CASE)
        for stage in gl.static_range(EARLY):
            bar = ring.full.index(stage)
            expect_step(bar, n, BOX)
            tma_load(w_desc, [weight_row, stage * STEP], bar, ring.weights.index(stage))
    gdc_wait()
    gdc_launch_dependents()
    stage = 0
    phase = 1
    number = 0
    task = first
    coming = tasks
    while task < tasks:
        block, tile, expert = place(task, blocks, tables, CASE)
        n = filled(block, tables)
        announce(box, number, packed(block, tile, expert, n))
        number += 1
        act_row = block * BLOCK_M
        weight_row = expert * CASE.N + tile * wide_of(CASE)
        for k in range(KSTEPS):
            if k == KSTEPS // 2:
                coming = draw(counter_ptr, tables.R)
            mbarrier.wait(ring.empty.index(stage), phase)
            bar = ring.full.index(stage)
            if (task != first) | (k >= EARLY):
                expect_step(bar, n, BOX)
                tma_load(w_desc, [weight_row, k * STEP], bar, ring.weights.index(stage))
            for i in gl.static_range(0, BLOCK_M, BOX):
                part = ring.rows.index(stage).slice(i, BOX, 0)
                tma_load(act_desc, [act_row + i, k * STEP], bar, part, pred=i < 16 << n)
            if CASE.STEPPED:
                at = act_scales.pointer + (k * act_scales.blocks + block) * BLOCK_M
                cp_async(ring.scales.index(stage), at + row)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, CASE.STAGES)
        task = coming
    announce(box, number, NO_TASK)


@gluon.jit
def down_consumer(
    out_desc, buffers, box, bias_ptr, act_scales, scales, ring, tables, push,
    CASE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    turn = 1 - WHICH
    number = 0
    # The scales of act are read here, not only by the producer.
    gdc_wait()
    word = hear(box, number)
    while word >= 0:
        row, tile, expert, rows = unpacked(word, WHICH)
        column = tile * wide_of(CASE)
        if rows > 0:
            if push[0] is not None:
                slots = slots_of_half(tables.slots, row)
            row_scale = None
            if not CASE.STEPPED:
                at = (row + gl.arange(0, HALF_M, BY_ROW)) * act_scales.stride
                row_scale = gl.load(act_scales.pointer + at, cache_modifier=".cg")
            low, high, stage, phase, turn = tile_sums(
                ring, stage, phase, turn, scales, bias_ptr, row_scale, expert, column,
                buffers.index(0), CASE, WHICH,
            )  # fmt: skip
            if push[0] is None:
                store_tile(out_desc, buffers, low, row, column, rows)
                store_tile(out_desc, buffers, high, row, column + TILE_N, rows)
            else:
                lines, there = lines_of(push, slots, tables.R, CASE.N, buffers.dtype)
                push_tile(lines, there, buffers, low, column, CASE.N)
                push_tile(lines, there, buffers, high, column + TILE_N, CASE.N)
        else:
            stage, phase, turn = skip(ring, stage, phase, turn, CASE, WHICH)
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
    CASE: gl.constexpr,
):
    """``bases_ptr``: as in ``hopper_prefill_down``."""
    ring, out0, out1 = open_ring(w_desc, out_desc, 32 if CASE.STEPPED else 0, CASE)
    box = open_box(2, gl.int64)
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)
    scales = Scales(scale_ptr, stride_se, stride_sn, 0, scale_row_step, scale_block)
    act_scales = ActScales(act_scale_ptr, stride_am, scale_blocks)
    push = (bases_ptr, picks_at, share)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (out_desc, out0, box, bias_ptr, act_scales, scales, ring, tables, push, CASE, 0),
            ),
            (
                down_consumer,
                (out_desc, out1, box, bias_ptr, act_scales, scales, ring, tables, push, CASE, 1),
            ),
            (
                down_producer,
                (act_desc, w_desc, box, counter_ptr, act_scales, ring, tables, CASE),
            ),
        ],
        # With more registers for consumers the compiler overlaps products with sums, and spills.
        [4, 1],
        [216, 72],
    )
