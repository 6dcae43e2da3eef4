"""The second launch of ``hopper_mixed_prefill``: act [P, I], w2 -> y [P, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.hopper_common import next_stage
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

UNSPECIALIZED = ("scale_row_step", "scale_block", "num_local")


@gluon.jit
def down_producer(
    descs,
    act_desc,
    rings,
    bars,
    tables,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    w_ring, x_ring = rings
    full, empty = bars
    expert_ids_ptr, num_post_ptr = tables
    STAGES: gl.constexpr = x_ring.shape[0]
    SLOTS: gl.constexpr = x_ring.shape[1]
    ROWS: gl.constexpr = w_ring.shape[1]
    BYTES: gl.constexpr = ROWS * w_ring.shape[2] * 4 + SLOTS * STEP * 2
    KSTEPS: gl.constexpr = (I + STEP - 1) // STEP
    blocks = gl.load(num_post_ptr) // SLOTS
    tasks = blocks * TILES
    first = gl.program_id(0)
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(STAGES, KSTEPS)
    if first < tasks:
        block, tile = tile_of(first, blocks, TILES, GROUP_M)
        weight_row = expert_at(expert_ids_ptr, block, num_local) * H + tile * ROWS
        for stage in gl.static_range(EARLY):
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            load_words(descs, w_ring.index(stage), bar, weight_row, ROWS // 2, stage)
    gdc_wait()
    gdc_launch_dependents()
    stage = 0
    phase = 1
    for task in range(first, tasks, gl.num_programs(0)):
        block, tile = tile_of(task, blocks, TILES, GROUP_M)
        weight_row = expert_at(expert_ids_ptr, block, num_local) * H + tile * ROWS
        for k in range(KSTEPS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if (task != first) | (k >= EARLY):
                mbarrier.expect(bar, BYTES)
                load_words(descs, w_ring.index(stage), bar, weight_row, ROWS // 2, k)
            tma.async_copy_global_to_shared(
                act_desc, [block * SLOTS, k * STEP], bar, x_ring.index(stage)
            )
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def finish_product(
    out_desc, buffers, acc, pointers, scales, expert, row, tile, INDEX: gl.constexpr,
    H: gl.constexpr, I: gl.constexpr, ELEMENT: gl.constexpr,  # noqa: E741
    GROUP: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Scales, biases and store of one product's sums."""
    scale_ptr, _, scale2_ptr, bias_ptr = pointers
    first = rows_of(tile, INDEX, ROWS, False)
    low, high = finished(
        acc, scale_ptr, scale2_ptr, bias_ptr, scales, (0, 1), expert, first, H, I, ELEMENT, GROUP,
        False,
    )  # fmt: skip
    store_side(out_desc, buffers, low, row, first[0], 0)
    store_side(out_desc, buffers, high, row, first[1], 1)


@gluon.jit
def down_consumer(
    out_desc,
    buffers,
    pointers,
    scales,
    rings,
    bars,
    tables,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    ELEMENT: gl.constexpr,
    GROUP: gl.constexpr,
    TILES: gl.constexpr,
    GROUP_M: gl.constexpr,
    AHEAD: gl.constexpr,
    WHICH: gl.constexpr,
):
    scale_ptr, zero_ptr, _, _ = pointers
    expert_ids_ptr, num_post_ptr = tables
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
            scale_ptr, zero_ptr, scales, expert, rows_of(tile, INDEX, ROWS, False), H, I, ELEMENT,
            GROUP, False,
        )  # fmt: skip
        if PARTS == 1:
            acc, stage, phase = multiply_one(
                rings, bars, stage, phase, one, I, ELEMENT, GROUP, False, INDEX
            )
        else:
            other = group_pointers(
                scale_ptr, zero_ptr, scales, expert, rows_of(tile, INDEX + 1, ROWS, False), H, I,
                ELEMENT, GROUP, False,
            )  # fmt: skip
            acc, more, stage, phase = multiply_two(
                rings, bars, stage, phase, one, other, I, ELEMENT, GROUP, False, INDEX, AHEAD
            )
        row = block * SLOTS
        finish_product(
            out_desc, buffers, acc, pointers, scales, expert, row, tile, INDEX, H, I, ELEMENT,
            GROUP, ROWS,
        )  # fmt: skip
        if PARTS == 2:
            finish_product(
                out_desc, buffers, more, pointers, scales, expert, row, tile, INDEX + 1, H, I,
                ELEMENT, GROUP, ROWS,
            )  # fmt: skip
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
    num_post_ptr,
    stride_se,
    scale_row_step,
    scale_block,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    ELEMENT: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """As ``up_kernel``, of w2; both descriptors are the same."""
    TILES: gl.constexpr = (H + ROWS - 1) // ROWS
    WORDS: gl.constexpr = words_of_step(ELEMENT)
    rings, bars, out0, out1 = open_rings(low_desc, out_desc, SLOTS, ROWS, WORDS, STAGES, 0)
    tables = (expert_ids_ptr, num_post_ptr)
    pointers = (scale_ptr, zero_ptr, scale2_ptr, bias_ptr)
    scales = (stride_se, 0, scale_row_step, scale_block)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (
                    out_desc, out0, pointers, scales, rings, bars, tables, num_local, H, I,
                    ELEMENT, GROUP, TILES, GROUP_M, AHEAD, 0,
                ),
            ),
            (
                down_consumer,
                (
                    out_desc, out1, pointers, scales, rings, bars, tables, num_local, H, I,
                    ELEMENT, GROUP, TILES, GROUP_M, AHEAD, 1,
                ),
            ),
            (
                down_producer,
                (
                    (low_desc, high_desc), act_desc, rings, bars, tables, num_local, H, I, TILES,
                    GROUP_M,
                ),
            ),
        ],
        [4, 1],
        [232, 40] if AHEAD else [216, 72],
    )  # fmt: skip
