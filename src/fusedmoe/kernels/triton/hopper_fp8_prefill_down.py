"""The second launch of ``hopper_fp8_prefill``: quantized act [P, I], w2 -> y [P, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_fp8_prefill_common import (
    BY_ROW,
    STEP,
    is_live,
    load_bias,
    multiply_stepped,
    multiply_whole,
    open_rings,
    place,
    scale_row,
    with_row_scales,
)
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    store_tile,
)

UNSPECIALIZED = (
    "stride_am", "stride_ak", "stride_se", "stride_sn", "scale_row_step", "scale_block", "R",
    "num_local",
)  # fmt: skip


@gluon.jit
def down_producer(
    descs,
    rings,
    bars,
    tables,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """As ``hopper_prefill_down.down_producer``, of bytes."""
    a_ring, b_ring = rings
    full, empty = bars
    act_desc, w_desc = descs
    expert_ids_ptr, num_post_ptr = tables
    STAGES: gl.constexpr = a_ring.shape[0]
    blocks = gl.load(num_post_ptr) // BLOCK_M
    tasks = blocks * TILES
    first = gl.program_id(0)
    # The tables were complete before up_kernel let this launch begin; weights depend on nothing.
    EARLY: gl.constexpr = min(STAGES, (I + STEP - 1) // STEP)
    BYTES: gl.constexpr = (BLOCK_M + 2 * TILE_N) * STEP
    if first < tasks:
        _, tile, expert = place(first, blocks, expert_ids_ptr, num_local, TILES, GROUP)
        weight_row = expert * H + tile * (2 * TILE_N)
        for stage in gl.static_range(EARLY):
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(
                w_desc, [weight_row, stage * STEP], bar, b_ring.index(stage)
            )
    gdc_wait()
    gdc_launch_dependents()
    stage = 0
    phase = 1
    for task in range(first, tasks, gl.num_programs(0)):
        block, tile, expert = place(task, blocks, expert_ids_ptr, num_local, TILES, GROUP)
        weight_row = expert * H + tile * (2 * TILE_N)
        for k in range(0, I, STEP):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if (task != first) | (k >= EARLY * STEP):
                mbarrier.expect(bar, BYTES)
                tma.async_copy_global_to_shared(w_desc, [weight_row, k], bar, b_ring.index(stage))
            tma.async_copy_global_to_shared(
                act_desc, [block * BLOCK_M, k], bar, a_ring.index(stage)
            )
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def down_consumer(
    out_desc,
    buffers,
    bias_ptr,
    act_scales,
    scales,
    rings,
    bars,
    tables,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PROMOTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
    WHICH: gl.constexpr,
):
    expert_ids_ptr, _, num_post_ptr = tables
    act_scale_ptr, stride_am, stride_ak = act_scales
    KSTEPS: gl.constexpr = (I + STEP - 1) // STEP
    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 0
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    coming = is_live(first, blocks, tables, R, num_local, TILES, GROUP, WHICH)
    # The scales of act are read here, not only by the producer.
    gdc_wait()
    for task in range(first, blocks * TILES, programs):
        block, tile, expert = place(task, blocks, expert_ids_ptr, num_local, TILES, GROUP)
        row = block * BLOCK_M + WHICH * HALF_M
        column = tile * (2 * TILE_N)
        live = coming & True
        coming = is_live(task + programs, blocks, tables, R, num_local, TILES, GROUP, WHICH)
        row_scales = act_scale_ptr + (row + gl.arange(0, HALF_M, BY_ROW)) * stride_am
        if PER_SCALE > 0:
            low, high, stage, phase = multiply_stepped(
                rings, bars, stage, phase, live, row_scales, stride_ak.to(gl.int64),
                scale_row(scales, expert, 0, column, H),
                scale_row(scales, expert, 0, column + TILE_N, H),
                KSTEPS, PER_SCALE, WHICH,
            )  # fmt: skip
        elif PROMOTED:
            low, high, stage, phase = multiply_stepped(
                rings, bars, stage, phase, live, None, 0, None, None, KSTEPS, 1, WHICH
            )
        else:
            low, high, stage, phase = multiply_whole(rings, bars, stage, phase, live, KSTEPS, WHICH)
        if live:
            if PER_SCALE == 0:
                low, high = with_row_scales(
                    low, high, scales, expert, row_scales, 0, column, TILE_N, H
                )
            if bias_ptr is not None:
                at = bias_ptr + expert.to(gl.int64) * H + column
                low += load_bias(at, 1, H - column)
                high += load_bias(at + TILE_N, 1, H - column - TILE_N)
            store_tile(out_desc, buffers, low, row, column)
            store_tile(out_desc, buffers, high, row, column + TILE_N)
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
    stride_am,
    stride_ak,
    stride_se,
    stride_sn,
    scale_row_step,
    scale_block,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PROMOTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """act_scale_ptr: strides per row and per 128 columns. PER_SCALE as in ``up_kernel``."""
    TILES: gl.constexpr = (H + 2 * TILE_N - 1) // (2 * TILE_N)
    rings, bars, out0, out1 = open_rings(w_desc, out_desc, STAGES, 0)
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    scales = (scale_ptr, stride_se, stride_sn, 0, scale_row_step, scale_block)
    act_scales = (act_scale_ptr, stride_am, stride_ak)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (
                    out_desc, out0, bias_ptr, act_scales, scales, rings, bars, tables, R,
                    num_local, H, I, PROMOTED, PER_SCALE, TILES, GROUP, 0,
                ),
            ),
            (
                down_consumer,
                (
                    out_desc, out1, bias_ptr, act_scales, scales, rings, bars, tables, R,
                    num_local, H, I, PROMOTED, PER_SCALE, TILES, GROUP, 1,
                ),
            ),
            (
                down_producer,
                (
                    (act_desc, w_desc), rings, bars, (expert_ids_ptr, num_post_ptr), num_local,
                    H, I, TILES, GROUP,
                ),
            ),
        ],
        # More registers for consumers spill more: products would overlap sums that do not fit.
        [4, 1],
        [216, 72],
    )  # fmt: skip
