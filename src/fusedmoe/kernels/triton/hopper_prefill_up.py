"""The first launch of ``hopper_prefill``: x [T, H], w1 -> act [P, I], and position [R]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.gluon_names import cp_async, tma_load
from fusedmoe.kernels.triton.hopper_arrivals import await_rows
from fusedmoe.kernels.triton.hopper_common import (
    expert_at,
    hopper_activation,
    known,
    next_stage,
    rows_layout,
    tile_of_run,
)
from fusedmoe.kernels.triton.hopper_drawn import draw, open_box
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    announce_half,
    halves,
    hear_half,
    is_whole,
    load_bias,
    multiply,
    open_rings,
    store_tile,
)

UNSPECIALIZED = ("R", "num_local", "desc_rows", "me", "timeout_us")


@gluon.jit
def rows_at(place, store, x, position_ptr, sorted_ptr, R, PICKS: gl.constexpr):
    """(rows of x [n, 1], which of them live) at these places [n] of the table; the place of each
    slot is noted if ``store``. x: (rows, stride, None, or where some of them stand elsewhere, with
    the same stride, the number of the first of those and how many they are)."""
    slots = gl.load(sorted_ptr + place)
    live = (slots >= 0) & (slots < R)
    slots = gl.where(live, slots, 0)
    if store:
        gl.store(position_ptr + slots, place, live)
    token = (slots // PICKS).to(gl.int64)
    x_rows = x[0] + token * x[1]
    if x[2] is not None:
        elsewhere = (token >= x[3]) & (token < x[3] + x[4])
        x_rows = gl.where(elsewhere, x[2] + (token - x[3]) * x[1], x_rows)
    return gl.expand_dims(x_rows, 1), gl.expand_dims(live, 1)


@gluon.jit
def gather(a, x_rows, live, column, H: gl.constexpr, BK: gl.constexpr):
    """Columns [1, BK] of these rows; dead rows and columns past H become zero."""
    if H % BK == 0:  # noqa: SIM108 (a compile-time branch)
        inside = live
    else:
        inside = live & (column < H)
    cp_async(a, x_rows + column, inside)


@gluon.jit
def up_producer(
    descs,
    box,
    counter_ptr,
    rings,
    bars,
    x,
    position_ptr,
    tables,
    arrivals,
    sizes,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    WORLD: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
):
    a_ring, b_ring = rings
    full, empty = bars
    low_desc, high_desc = descs
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, desc_rows = sizes
    STAGES: gl.constexpr = a_ring.shape[0]
    BK: gl.constexpr = a_ring.shape[2]
    # The next task is drawn as late as its latency allows: a ring before it is begun.
    DRAW_AT: gl.constexpr = max((H + BK - 1) // BK - STAGES, 0) * BK
    layout: gl.constexpr = rows_layout(HALF_M, BK, gl.num_warps())
    row = gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(0, layout)), 0)

    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 1
    number = 0
    all_here = 0
    task = gl.program_id(0)
    tasks = blocks * TILES
    coming = tasks
    while task < tasks:
        block, tile, expert = tile_of_run(task, blocks, expert_ids_ptr, TILES, GROUP)
        expert = known(expert, num_local)
        all_here = await_rows(arrivals, block, all_here, WORLD)
        place = block * BLOCK_M + row
        x_rows, lives = rows_at(place, tile == 0, x, position_ptr, sorted_ptr, R, PICKS)
        place += HALF_M
        x_rest, lives_rest = rows_at(place, tile == 0, x, position_ptr, sorted_ptr, R, PICKS)
        whole = is_whole(block, sorted_ptr, R)
        announce_half(box, number, block * TILES + tile, whole)
        number += 1
        weight_row = expert * desc_rows + tile * WIDE
        for k in range(0, H, BK):
            if k == DRAW_AT:
                coming = draw(counter_ptr, R)
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * TILE_N * BK * 2)
            low = b_ring.index(stage).slice(0, TILE_N, 0)
            high = b_ring.index(stage).slice(TILE_N, TILE_N, 0)
            tma_load(low_desc, [weight_row, k], bar, low)
            tma_load(high_desc, [weight_row + BELOW, k], bar, high)
            gather(a_ring.index(stage).slice(0, HALF_M, 0), x_rows, lives, k + column, H, BK)
            if whole:
                rest = a_ring.index(stage).slice(HALF_M, HALF_M, 0)
                gather(rest, x_rest, lives_rest, k + column, H, BK)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce_half(box, number, tasks, False)


@gluon.jit
def up_consumer(
    out_desc,
    buffers,
    box,
    bias_ptr,
    rings,
    bars,
    tables,
    sizes,
    numbers,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
    WHICH: gl.constexpr,
):
    expert_ids_ptr, _, num_post_ptr = tables
    _, num_local, _ = sizes
    limit, alpha, beta = numbers
    BK: gl.constexpr = rings[0].shape[2]
    KSTEPS: gl.constexpr = (H + BK - 1) // BK
    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 0
    number = 0
    at, live = hear_half(box, number, WHICH)
    while at < blocks * TILES:
        block, tile = at // TILES, at % TILES
        row = block * BLOCK_M + WHICH * HALF_M
        acc, stage, phase = multiply(rings, bars, stage, phase, live, KSTEPS, WHICH)
        if live:
            gate, up = halves(acc)
            column = tile * WIDE
            if bias_ptr is not None:
                STEP: gl.constexpr = 2 if INTERLEAVED else 1
                TO_UP: gl.constexpr = (1 if INTERLEAVED else I) if GATED else TILE_N
                expert = expert_at(expert_ids_ptr, block, num_local).to(gl.int64)
                bias = bias_ptr + expert * (2 * I if GATED else I) + column * STEP
                gate += load_bias(bias, STEP, I - column)
                up += load_bias(bias + TO_UP, STEP, I - column - BELOW)
            if GATED:
                act = hopper_activation(FORMULA, gate, up, limit, alpha, beta)
                store_tile(out_desc, buffers, act, row, column)
            else:
                store_tile(out_desc, buffers, plain_activation(FORMULA, gate), row, column)
                store_tile(out_desc, buffers, plain_activation(FORMULA, up), row, column + TILE_N)
        number += 1
        at, live = hear_half(box, number, WHICH)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    out_desc,
    bias_ptr,
    x_ptr,
    position_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counter_ptr,
    early_ptr,
    flags_ptr,
    state_ptr,
    error_ptr,
    own_ptr,
    stride_x,
    R,
    num_local,
    desc_rows,
    me,
    timeout_us,
    limit,
    alpha,
    beta,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    WORLD: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Descriptors as in ``hopper_decode.up_kernel``: gate and up, or w1 twice without a gate."""
    WIDE: gl.constexpr = TILE_N if GATED else 2 * TILE_N
    BELOW: gl.constexpr = 0 if GATED else TILE_N
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    rings, bars, out0, out1 = open_rings(low_desc, BK, STAGES, 128)
    box = open_box(2)
    gdc_wait()
    gdc_launch_dependents()
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    arrivals = (early_ptr, flags_ptr, state_ptr, error_ptr, me, timeout_us)
    per_rank = R // PICKS // WORLD
    x = (x_ptr, stride_x, own_ptr, me * per_rank, per_rank)
    sizes = (R, num_local, desc_rows)
    numbers = (limit, alpha, beta)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    out_desc, out0, box, bias_ptr, rings, bars, tables, sizes, numbers, H, I,
                    FORMULA, GATED, INTERLEAVED, TILES, WIDE, BELOW, GROUP, 0,
                ),
            ),
            (
                up_consumer,
                (
                    out_desc, out1, box, bias_ptr, rings, bars, tables, sizes, numbers, H, I,
                    FORMULA, GATED, INTERLEAVED, TILES, WIDE, BELOW, GROUP, 1,
                ),
            ),
            (
                up_producer,
                (
                    (low_desc, high_desc), box, counter_ptr, rings, bars, x,
                    position_ptr, tables, arrivals, sizes, H, I, PICKS, WORLD, GATED, INTERLEAVED,
                    TILES, WIDE, BELOW, GROUP,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip
