"""The first launch of ``hopper_prefill``: x [T, H], w1 -> act [P, I], and position [R]."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import cp_async, tma_load
from fusedmoe.kernels.triton.hopper_arrivals import await_rows
from fusedmoe.kernels.triton.hopper_common import Tables, next_stage, rows_layout
from fusedmoe.kernels.triton.hopper_drawn import draw, open_box
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    announce_half,
    below_of,
    is_whole,
    open_ring,
    place,
    tiles_of,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_prefill_consumer import consumer

UNSPECIALIZED = ("R", "num_local", "desc_rows", "me", "timeout_us")


class Source(NamedTuple):
    """Pointers to x, whose rows are ``stride`` apart, to where the place of each slot is noted, and
    to where ``own`` rows from number ``own_first`` on stand (None: among the others)."""

    x: gl.tensor
    stride: gl.tensor
    position: gl.tensor
    own: gl.tensor | None = None
    own_first: gl.tensor | None = None
    own_rows: gl.tensor | None = None


class BlockRows(NamedTuple):
    """What ``rows_at`` has of the first and of the second half of a block."""

    first: gl.tensor
    first_live: gl.tensor
    rest: gl.tensor
    rest_live: gl.tensor


@gluon.jit
def rows_at(place, store, source, tables, PICKS: gl.constexpr):
    """(rows of x [n, 1], which of them live) at these places [n] of the table; the place of each
    slot is noted if ``store``."""
    slots = gl.load(tables.slots + place)
    live = (slots >= 0) & (slots < tables.R)
    slots = gl.where(live, slots, 0)
    if store:
        gl.store(source.position + slots, place, live)
    token = (slots // PICKS).to(gl.int64)
    x_rows = source.x + token * source.stride
    if source.own is not None:
        own = (token >= source.own_first) & (token < source.own_first + source.own_rows)
        own_rows = source.own + (token - source.own_first) * source.stride
        # Triton 3.9 does not see the alignment of a choice, and copies of 16 bytes ask for it.
        x_rows = gl.multiple_of(gl.where(own, own_rows, x_rows), 16)
    return gl.expand_dims(x_rows, 1), gl.expand_dims(live, 1)


@gluon.jit
def rows_of_block(block, store, source, tables, row, PICKS: gl.constexpr):
    """``rows_at`` places ``row`` [HALF_M] of both halves."""
    at = block * BLOCK_M + row
    first, first_live = rows_at(at, store, source, tables, PICKS)
    at += HALF_M
    rest, rest_live = rows_at(at, store, source, tables, PICKS)
    return BlockRows(first, first_live, rest, rest_live)


@gluon.jit
def gather(a, x_rows, live, column, H: gl.constexpr, BK: gl.constexpr):
    """Columns [1, BK] of these rows; dead rows and columns past H become zero."""
    if H % BK == 0:  # noqa: SIM108 (a compile-time branch)
        inside = live
    else:
        inside = live & (column < H)
    cp_async(a, x_rows + column, inside)


@gluon.jit
def load_step(
    ring, stage, descs, weight_row, k, rows, whole, column, BELOW: gl.constexpr, H: gl.constexpr
):
    """Columns from k on of both weight tiles, from ``weight_row`` on and BELOW it, by TMA, and of
    the rows of a block, of its second half where it is ``whole``. The barrier expects the tiles."""
    BK: gl.constexpr = ring.rows.shape[2]
    bar = ring.full.index(stage)
    low = ring.weights.index(stage).slice(0, TILE_N, 0)
    high = ring.weights.index(stage).slice(TILE_N, TILE_N, 0)
    tma_load(descs[0], [weight_row, k], bar, low)
    tma_load(descs[1], [weight_row + BELOW, k], bar, high)
    first = ring.rows.index(stage).slice(0, HALF_M, 0)
    gather(first, rows.first, rows.first_live, k + column, H, BK)
    if whole:
        rest = ring.rows.index(stage).slice(HALF_M, HALF_M, 0)
        gather(rest, rows.rest, rows.rest_live, k + column, H, BK)


@gluon.jit
def up_producer(
    descs, box, counter_ptr, ring, source, tables, arrivals, desc_rows, CASE: gl.constexpr
):
    H: gl.constexpr = CASE.D
    STAGES: gl.constexpr = ring.rows.shape[0]
    BK: gl.constexpr = ring.rows.shape[2]
    TILES: gl.constexpr = tiles_of(CASE)
    # The next task is drawn as late as its latency allows: a ring before it is begun.
    DRAW_AT: gl.constexpr = max((H + BK - 1) // BK - STAGES, 0) * BK
    layout: gl.constexpr = rows_layout(BK, gl.num_warps())
    row = gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(0, layout)), 0)

    blocks = gl.load(tables.num_post) // BLOCK_M
    stage = 0
    phase = 1
    number = 0
    all_here = 0
    task = gl.program_id(0)
    tasks = blocks * TILES
    coming = tasks
    while task < tasks:
        block, tile, expert = place(task, blocks, tables, CASE)
        all_here = await_rows(arrivals, block, all_here, CASE.WORLD)
        rows = rows_of_block(block, tile == 0, source, tables, row, CASE.PICKS)
        whole = is_whole(block, tables)
        announce_half(box, number, block * TILES + tile, whole)
        number += 1
        weight_row = expert * desc_rows + tile * wide_of(CASE)
        for k in range(0, H, BK):
            if k == DRAW_AT:
                coming = draw(counter_ptr, tables.R)
            mbarrier.wait(ring.empty.index(stage), phase)
            bar = ring.full.index(stage)
            mbarrier.expect(bar, 2 * TILE_N * BK * 2)
            load_step(ring, stage, descs, weight_row, k, rows, whole, column, below_of(CASE), H)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        task = coming
    announce_half(box, number, tasks, False)


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
    CASE: gl.constexpr,
):
    """Descriptors as in ``hopper_decode.up_kernel``: gate and up, or w1 twice without a gate."""
    ring, out0, out1 = open_ring(low_desc, CASE.STAGES, 128)
    box = open_box(2)
    gdc_wait()
    gdc_launch_dependents()
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)
    arrivals = (early_ptr, flags_ptr, state_ptr, error_ptr, me, timeout_us)
    per_rank = R // CASE.PICKS // CASE.WORLD
    source = Source(x_ptr, stride_x, position_ptr, own_ptr, me * per_rank, per_rank)
    descs = (low_desc, high_desc)
    numbers = (limit, alpha, beta)
    gl.warp_specialize(
        [
            (consumer, (out_desc, out0, box, bias_ptr, ring, tables, numbers, (None,), CASE, 0)),
            (consumer, (out_desc, out1, box, bias_ptr, ring, tables, numbers, (None,), CASE, 1)),
            (
                up_producer,
                (descs, box, counter_ptr, ring, source, tables, arrivals, desc_rows, CASE),
            ),
        ],
        [4, 4],
        [216, 72],
    )
