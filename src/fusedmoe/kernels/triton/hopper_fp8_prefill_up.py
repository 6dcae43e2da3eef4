"""The first launch of ``hopper_fp8_prefill``: 8-bit x [T, H], w1 -> act [P, I], position [R]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import hopper_activation, next_stage
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
    store_whole,
    tile_columns,
    with_row_scales,
)
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    store_tile,
)
from fusedmoe.kernels.triton.quantize import quantized, scale_of

UNSPECIALIZED = (
    "stride_xs", "stride_se", "stride_sn", "scale_shard_step", "scale_row_step", "scale_block",
    "P", "R", "num_local", "desc_rows",
)  # fmt: skip


@gluon.jit
def up_producer(
    descs,
    rings,
    bars,
    x_ptr,
    position_ptr,
    tables,
    sizes,
    H: gl.constexpr,
    PICKS: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
):
    """As ``hopper_prefill_up.up_producer``, of bytes."""
    a_ring, b_ring = rings
    full, empty = bars
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, desc_rows = sizes
    STAGES: gl.constexpr = a_ring.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, layout)), 0)

    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 1
    for task in range(gl.program_id(0), blocks * TILES, gl.num_programs(0)):
        block, tile, expert = place(task, blocks, expert_ids_ptr, num_local, TILES, GROUP)
        slots = gl.load(sorted_ptr + block * BLOCK_M + row)
        live = (slots >= 0) & (slots < R)
        slots = gl.where(live, slots, 0)
        if tile == 0:
            gl.store(position_ptr + slots, block * BLOCK_M + row, live)
        x_rows = gl.expand_dims(x_ptr + (slots // PICKS).to(gl.int64) * H, 1)
        lives = gl.expand_dims(live, 1)
        weight_row = expert * desc_rows + tile * WIDE
        for k in range(0, H, STEP):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * TILE_N * STEP)
            low = b_ring.index(stage).slice(0, TILE_N, 0)
            high = b_ring.index(stage).slice(TILE_N, TILE_N, 0)
            tma.async_copy_global_to_shared(descs[0], [weight_row, k], bar, low)
            tma.async_copy_global_to_shared(descs[1], [weight_row + BELOW, k], bar, high)
            if H % STEP == 0:  # noqa: SIM108 (a compile-time branch)
                inside = lives
            else:
                inside = lives & (k + column < H)
            async_copy.async_copy_global_to_shared(
                a_ring.index(stage), x_rows + (k + column), inside
            )
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def store_rounded(
    out, act, row, column, WIDTH: gl.constexpr, OWN: gl.constexpr, E8M0: gl.constexpr
):
    """act [HALF_M, TILE_N] in 8 bits: with scales OWN to these rows and columns, which are stored,
    or with the given one. Columns from WIDTH on do not count."""
    desc, buffers, scale_ptr, P = out
    DTYPE: gl.constexpr = buffers.dtype
    if OWN:
        if WIDTH % TILE_N != 0:
            act = gl.where(gl.expand_dims(column + tile_columns() < WIDTH, 0), act, 0.0)
        scale = scale_of(act, 1, DTYPE, E8M0)
        at = (column // TILE_N).to(gl.int64) * P + row
        gl.store(scale_ptr + at + gl.arange(0, HALF_M, BY_ROW), scale)
        stored = quantized(act, gl.expand_dims(scale, 1), DTYPE)
    else:
        stored = quantized(act, gl.load(scale_ptr), DTYPE)
    store_whole(desc, buffers.index(0), stored, row, column)


@gluon.jit
def store_act(
    out, act, row, column,
    WIDTH: gl.constexpr, ROUNDED: gl.constexpr, OWN: gl.constexpr, E8M0: gl.constexpr,
):  # fmt: skip
    if ROUNDED:
        if column < WIDTH:
            store_rounded(out, act, row, column, WIDTH, OWN, E8M0)
    else:
        store_tile(out[0], out[1], act, row, column)


@gluon.jit
def up_consumer(
    out,
    bias_ptr,
    x_scales,
    scales,
    rings,
    bars,
    tables,
    sizes,
    numbers,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    PROMOTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    ROUNDED: gl.constexpr,
    OWN: gl.constexpr,
    E8M0: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
    WHICH: gl.constexpr,
):
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, _ = sizes
    limit, alpha, beta = numbers
    x_scale_ptr, stride_xs = x_scales
    KSTEPS: gl.constexpr = (H + STEP - 1) // STEP
    SHARD: gl.constexpr = 1 if GATED else 0
    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 0
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    coming = is_live(first, blocks, tables, R, num_local, TILES, GROUP, WHICH)
    for task in range(first, blocks * TILES, programs):
        block, tile, expert = place(task, blocks, expert_ids_ptr, num_local, TILES, GROUP)
        row = block * BLOCK_M + WHICH * HALF_M
        column = tile * WIDE
        live = coming & True
        coming = is_live(task + programs, blocks, tables, R, num_local, TILES, GROUP, WHICH)
        slots = gl.load(sorted_ptr + row + gl.arange(0, HALF_M, BY_ROW))
        token = gl.where((slots >= 0) & (slots < R), slots, 0) // PICKS
        row_scales = x_scale_ptr + token.to(gl.int64) * stride_xs
        if PER_SCALE > 0:
            low, high, stage, phase = multiply_stepped(
                rings, bars, stage, phase, live, row_scales, 1,
                scale_row(scales, expert, 0, column, I),
                scale_row(scales, expert, SHARD, column + BELOW, I),
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
                    low, high, scales, expert, row_scales, SHARD, column, BELOW, I
                )
            if bias_ptr is not None:
                BY: gl.constexpr = 2 if INTERLEAVED else 1
                TO_UP: gl.constexpr = (1 if INTERLEAVED else I) if GATED else TILE_N
                at = bias_ptr + expert.to(gl.int64) * (2 * I if GATED else I) + column * BY
                low += load_bias(at, BY, I - column)
                high += load_bias(at + TO_UP, BY, I - column - BELOW)
            if GATED:
                act = hopper_activation(FORMULA, low, high, limit, alpha, beta)
                store_act(out, act, row, column, I, ROUNDED, OWN, E8M0)
            else:
                low = plain_activation(FORMULA, low)
                store_act(out, low, row, column, I, ROUNDED, OWN, E8M0)
                high = plain_activation(FORMULA, high)
                store_act(out, high, row, column + TILE_N, I, ROUNDED, OWN, E8M0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    out_desc,
    bias_ptr,
    x_ptr,
    x_scale_ptr,
    scale_ptr,
    act_scale_ptr,
    position_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    stride_xs,
    stride_se,
    stride_sn,
    scale_shard_step,
    scale_row_step,
    scale_block,
    P,
    R,
    num_local,
    desc_rows,
    limit,
    alpha,
    beta,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    PROMOTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    OWN: gl.constexpr,
    E8M0: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Descriptors as in ``hopper_prefill_up``. PER_SCALE: so many steps share a scale (0: all).
    act_scale_ptr: fp32 [I / 128, P], written (OWN), or one number, or None where act is 16-bit."""
    WIDE: gl.constexpr = TILE_N if GATED else 2 * TILE_N
    BELOW: gl.constexpr = 0 if GATED else TILE_N
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    ROUNDED: gl.constexpr = act_scale_ptr is not None
    rings, bars, out0, out1 = open_rings(low_desc, out_desc, STAGES, 128)
    gdc_wait()
    gdc_launch_dependents()
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    sizes = (R, num_local, desc_rows)
    numbers = (limit, alpha, beta)
    scales = (scale_ptr, stride_se, stride_sn, scale_shard_step, scale_row_step, scale_block)
    x_scales = (x_scale_ptr, stride_xs)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    (out_desc, out0, act_scale_ptr, P), bias_ptr, x_scales, scales, rings, bars,
                    tables, sizes, numbers, H, I, PICKS, FORMULA, GATED, INTERLEAVED, PROMOTED,
                    PER_SCALE, ROUNDED, OWN, E8M0, TILES, WIDE, BELOW, GROUP, 0,
                ),
            ),
            (
                up_consumer,
                (
                    (out_desc, out1, act_scale_ptr, P), bias_ptr, x_scales, scales, rings, bars,
                    tables, sizes, numbers, H, I, PICKS, FORMULA, GATED, INTERLEAVED, PROMOTED,
                    PER_SCALE, ROUNDED, OWN, E8M0, TILES, WIDE, BELOW, GROUP, 1,
                ),
            ),
            (
                up_producer,
                (
                    (low_desc, high_desc), rings, bars, x_ptr, position_ptr, tables, sizes, H,
                    PICKS, TILES, WIDE, BELOW, GROUP,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip
