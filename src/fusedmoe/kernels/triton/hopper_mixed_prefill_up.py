"""The first launch of ``hopper_mixed_prefill``: x [T, H], w1 -> act [P, I], and position [R]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import hopper_activation, next_stage, rows_layout
from fusedmoe.kernels.triton.hopper_mixed_multiply import (
    group_pointers,
    multiply_one,
    multiply_two,
    rows_of,
)
from fusedmoe.kernels.triton.hopper_mixed_numbers import STEP, words_of_step
from fusedmoe.kernels.triton.hopper_mixed_prefill_common import (
    expert_at,
    finished,
    load_words,
    open_rings,
    store_side,
)
from fusedmoe.kernels.triton.hopper_prefill_common import tile_of
from fusedmoe.kernels.triton.hopper_prefill_up import gather, rows_at

UNSPECIALIZED = (
    "scale_shard_step", "scale_row_step", "scale_block", "R", "num_local", "desc_rows",
)  # fmt: skip


@gluon.jit
def up_producer(
    descs,
    rings,
    bars,
    x,
    position_ptr,
    tables,
    sizes,
    H: gl.constexpr,
    PICKS: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    w_ring, x_ring = rings
    full, empty = bars
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, desc_rows = sizes
    STAGES: gl.constexpr = x_ring.shape[0]
    SLOTS: gl.constexpr = x_ring.shape[1]
    BYTES: gl.constexpr = w_ring.shape[1] * w_ring.shape[2] * 4
    KSTEPS: gl.constexpr = (H + STEP - 1) // STEP
    layout: gl.constexpr = rows_layout(SLOTS, STEP, gl.num_warps())
    row = gl.arange(0, SLOTS, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, layout)), 0)
    blocks = gl.load(num_post_ptr) // SLOTS
    stage = 0
    phase = 1
    for task in range(gl.program_id(0), blocks * TILES, gl.num_programs(0)):
        block, tile = tile_of(task, blocks, TILES, GROUP_M)
        weight_row = expert_at(expert_ids_ptr, block, num_local) * desc_rows + tile * WIDE
        place = block * SLOTS + row
        x_rows, lives = rows_at(place, tile == 0, x, position_ptr, sorted_ptr, R, PICKS)
        for k in range(KSTEPS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            load_words(descs, w_ring.index(stage), bar, weight_row, BELOW, k)
            gather(x_ring.index(stage), x_rows, lives, k * STEP + column, H, STEP)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def finish_product(
    out_desc, buffers, acc, pointers, scales, bias_steps, expert, row, tile, numbers,
    INDEX: gl.constexpr, FIRST: gl.constexpr, H: gl.constexpr, I: gl.constexpr,  # noqa: E741
    ELEMENT: gl.constexpr, GROUP: gl.constexpr, FORMULA: gl.constexpr, GATED: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """Scales, biases, activation and store of one product's sums."""
    scale_ptr, _, scale2_ptr, bias_ptr = pointers
    limit, alpha, beta = numbers
    first = rows_of(tile, INDEX, ROWS, GATED)
    low, high = finished(
        acc, scale_ptr, scale2_ptr, bias_ptr, scales, bias_steps, expert, first, I, H, ELEMENT,
        GROUP, GATED,
    )  # fmt: skip
    if GATED:
        act = hopper_activation(FORMULA, low, high, limit, alpha, beta)
        store_side(out_desc, buffers, act, row, first[0], FIRST)
    else:
        store_side(out_desc, buffers, plain_activation(FORMULA, low), row, first[0], 0)
        store_side(out_desc, buffers, plain_activation(FORMULA, high), row, first[1], 1)


@gluon.jit
def up_consumer(
    out_desc,
    buffers,
    pointers,
    scales,
    bias_steps,
    rings,
    bars,
    tables,
    sizes,
    numbers,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    ELEMENT: gl.constexpr,
    GROUP: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    TILES: gl.constexpr,
    GROUP_M: gl.constexpr,
    AHEAD: gl.constexpr,
    WHICH: gl.constexpr,
):
    scale_ptr, zero_ptr, _, _ = pointers
    expert_ids_ptr, _, num_post_ptr = tables
    num_local = sizes[1]
    ROWS: gl.constexpr = rings[0].shape[1]
    SLOTS: gl.constexpr = rings[1].shape[1]
    PARTS: gl.constexpr = ROWS // 128
    INDEX: gl.constexpr = WHICH * PARTS
    blocks = gl.load(num_post_ptr) // SLOTS
    stage = 0
    phase = 0
    for task in range(gl.program_id(0), blocks * TILES, gl.num_programs(0)):
        block, tile = tile_of(task, blocks, TILES, GROUP_M)
        expert = expert_at(expert_ids_ptr, block, num_local)
        one = group_pointers(
            scale_ptr, zero_ptr, scales, expert, rows_of(tile, INDEX, ROWS, GATED), I, H, ELEMENT,
            GROUP, GATED,
        )  # fmt: skip
        if PARTS == 1:
            acc, stage, phase = multiply_one(
                rings, bars, stage, phase, one, H, ELEMENT, GROUP, GATED, INDEX
            )
        else:
            other = group_pointers(
                scale_ptr, zero_ptr, scales, expert, rows_of(tile, INDEX + 1, ROWS, GATED), I, H,
                ELEMENT, GROUP, GATED,
            )  # fmt: skip
            acc, more, stage, phase = multiply_two(
                rings, bars, stage, phase, one, other, H, ELEMENT, GROUP, GATED, INDEX, AHEAD
            )
        row = block * SLOTS
        finish_product(
            out_desc, buffers, acc, pointers, scales, bias_steps, expert, row, tile, numbers, INDEX,
            0, H, I, ELEMENT, GROUP, FORMULA, GATED, ROWS,
        )  # fmt: skip
        if PARTS == 2:
            finish_product(
                out_desc, buffers, more, pointers, scales, bias_steps, expert, row, tile, numbers,
                INDEX + 1, 1, H, I, ELEMENT, GROUP, FORMULA, GATED, ROWS,
            )  # fmt: skip
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
    ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """low_desc, high_desc: words of gate and of up, or w1 twice, with ``desc_rows`` rows for each
    expert. GROUP columns share a scale (0: a row does)."""
    WIDE: gl.constexpr = ROWS // 2 if GATED else ROWS
    BELOW: gl.constexpr = 0 if GATED else ROWS // 2
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    WORDS: gl.constexpr = words_of_step(ELEMENT)
    rings, bars, out0, out1 = open_rings(low_desc, out_desc, SLOTS, ROWS, WORDS, STAGES, 128)
    gdc_wait()
    gdc_launch_dependents()
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    sizes = (R, num_local, desc_rows)
    numbers = (limit, alpha, beta)
    pointers = (scale_ptr, zero_ptr, scale2_ptr, bias_ptr)
    scales = (stride_se, scale_shard_step, scale_row_step, scale_block)
    TO_UP: gl.constexpr = 1 if INTERLEAVED else I
    bias_steps = (TO_UP, 2 if INTERLEAVED else 1)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    out_desc, out0, pointers, scales, bias_steps, rings, bars, tables, sizes,
                    numbers, H, I, ELEMENT, GROUP, FORMULA, GATED, TILES, GROUP_M, AHEAD, 0,
                ),
            ),
            (
                up_consumer,
                (
                    out_desc, out1, pointers, scales, bias_steps, rings, bars, tables, sizes,
                    numbers, H, I, ELEMENT, GROUP, FORMULA, GATED, TILES, GROUP_M, AHEAD, 1,
                ),
            ),
            (
                up_producer,
                (
                    (low_desc, high_desc), rings, bars, (x_ptr, stride_x), position_ptr, tables,
                    sizes, H, PICKS, TILES, WIDE, BELOW, GROUP_M,
                ),
            ),
        ],
        [4, 4],
        [224, 56] if AHEAD else [216, 72],
    )  # fmt: skip
