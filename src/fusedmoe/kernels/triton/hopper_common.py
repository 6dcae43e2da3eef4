"""Pieces that the Hopper kernels share: layouts, blocks of slots, loads onto a barrier, stores.

A block is BN slots of one expert, as ``moe_align_block_size`` lays them out. Tables and values that
an earlier launch of the same chain wrote are read past the L1 cache (".cg"), which may hold lines
from before it.
"""

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
)

from fusedmoe.kernels.triton.activation import gated_activation
from fusedmoe.kernels.triton.gluon_names import cp_async, tma_load


class Tables(NamedTuple):
    """Where blocks of slots stand: pointers to the expert of each, to the slot of each place and to
    the number of places; R slots of ``num_local`` experts."""

    experts: gl.tensor
    slots: gl.tensor
    num_post: gl.tensor
    R: gl.tensor
    num_local: gl.tensor


class Scales(NamedTuple):
    """The scales of weights: a pointer, and the steps that ``weight_addresses`` has of them."""

    pointer: gl.tensor
    stride_expert: gl.tensor
    stride_row: gl.tensor
    shard_step: gl.tensor
    row_step: gl.tensor
    block: gl.tensor


@gluon.constexpr_function
def rows_layout(BK, num_warps):
    """[rows, BK] elements, 16 bytes per thread, whole rows: the shape of a cp.async gather."""
    lanes = min(32, BK // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def columns_layout(num_warps):
    """[TILE, BN], 16 bytes per thread along TILE, in each warp the rows of its products: what a
    transposed store needs without waiting for other warps."""
    return gl.BlockedLayout([8, 1], [2, 16], [num_warps, 1], [0, 1])


@gluon.constexpr_function
def wide_of(CASE):
    """Features of a tile: VALID rows each of gate and of up or, not GATED, of neighbours."""
    return CASE.VALID if CASE.GATED else 2 * CASE.VALID


@gluon.constexpr_function
def tiles_of(CASE):
    """Such tiles that all N features make."""
    return -(-CASE.N // wide_of(CASE))


@gluon.jit
def open_barriers(STAGES: gl.constexpr, GATHERERS: gl.constexpr):
    """STAGES barriers; each opens after one TMA arrival and a gather by GATHERERS threads."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1 + GATHERERS)
    fence_async_shared()
    return bars


@gluon.jit
def sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) in four instructions, within a few units of fp32's last place."""
    return gl.inline_asm_elementwise(
        """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def hopper_activation(FORMULA: gl.constexpr, gate, up, limit, alpha, beta):
    """``gated_activation``; the sigmoid of the common formulas is the epilogue's main cost."""
    if FORMULA == "silu" or FORMULA == "swigluoai":
        if limit is not None:
            gate = gl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
            up = gl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
            up = gl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
        if FORMULA == "swigluoai":
            return (up + beta) * gate * sigmoid(alpha * gate)
        else:
            return gate * sigmoid(gate) * up
    else:
        return gated_activation(FORMULA, gate, up, limit, alpha, beta)


@gluon.jit
def known(expert, num_local):
    """The expert, which then has weights, whatever the table said."""
    return gl.minimum(gl.maximum(expert, 0), num_local - 1)


@gluon.jit
def expert_at(expert_ids_ptr, block, num_local):
    return known(gl.load(expert_ids_ptr + block), num_local)


@gluon.jit
def tile_of(task, blocks, TILES: gl.constexpr, GROUP: gl.constexpr):
    """(block, column tile): groups of GROUP blocks, column tiles outer, blocks inner, so that
    blocks of one expert find its weights in the L2."""
    first = task // (GROUP * TILES) * GROUP
    size = gl.minimum(blocks - first, GROUP)
    rest = task - first * TILES
    return first + rest % size, rest // size


@gluon.jit
def tile_of_run(
    task, blocks, experts_ptr, TILES: gl.constexpr, GROUP: gl.constexpr, ENTRIES: gl.constexpr = 1
):
    """(block, column tile, expert as the table has it, in ENTRIES entries a block): groups of one
    expert's blocks alone, those side by side in a window of GROUP places, a power of two; column
    tiles outer, blocks inner. An expert may come again: where rows arrive late, those of this rank
    have blocks of their own before all others."""
    own = task // TILES
    begin = own // GROUP * GROUP
    place = gl.arange(0, GROUP, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    place += begin
    experts = gl.load(experts_ptr + place * ENTRIES, mask=place < blocks, other=-2)
    expert = gl.load(experts_ptr + own * ENTRIES)
    other = experts != expert
    first = gl.max(gl.where(other & (place < own), place + 1, begin), 0)
    size = gl.min(gl.where(other & (place > own), place, begin + GROUP), 0) - first
    rest = task - first * TILES
    return first + rest % size, rest // size, expert


@gluon.jit
def slots_of(block, sorted_ptr, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Slots [BN] of a block, in LAYOUT; a place without one is -1 or >= R."""
    return gl.load(sorted_ptr + block * BN + gl.arange(0, BN, LAYOUT), cache_modifier=".cg")


@gluon.jit
def rows_of(ptr, slots, R, stride, PICKS: gl.constexpr):
    """(where the rows of these slots begin, PICKS slots a row, and which slots live)."""
    live = (slots >= 0) & (slots < R)
    return ptr + (gl.where(live, slots, 0) // PICKS).to(gl.int64) * stride, live


@gluon.jit
def issue_tiles(descs, ring, rows, bars, stage, k):
    """One step's TMA tiles, one below the other in the ring; they and the arrivals of others open
    the barrier."""
    bar = bars.index(stage)
    TILE: gl.constexpr = ring.shape[1] // len(descs)
    BK: gl.constexpr = ring.shape[2]
    mbarrier.expect(bar, len(descs) * TILE * BK * 2)
    for i in gl.static_range(len(descs)):
        to = ring.index(stage)
        if len(descs) > 1:
            to = to.slice(i * TILE, TILE, 0)
        tma_load(descs[i], [rows[i], k], bar, to)


@gluon.jit
def issue_rows(x_rows, live, x_ring, bars, stage, k, WIDTH: gl.constexpr):
    """Gather x_rows[:, k : k + BK]; dead rows and columns past WIDTH become zero."""
    BK: gl.constexpr = x_ring.shape[2]
    layout: gl.constexpr = rows_layout(BK, gl.num_warps())
    column = gl.expand_dims(k + gl.arange(0, BK, gl.SliceLayout(0, layout)), 0)
    mask = gl.expand_dims(live, 1) & (column < WIDTH)
    cp_async(x_ring.index(stage), gl.expand_dims(x_rows, 1) + column, mask)
    async_copy.mbarrier_arrive(bars.index(stage), increment_count=False)


@gluon.jit
def next_step(task, k, programs, KSTEPS: gl.constexpr):
    k += 1
    if k == KSTEPS:
        k = 0
        task += programs
    return task, k


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def upper_and_lower(acc):
    """The two halves of the rows of acc."""
    TILE: gl.constexpr = acc.shape[0] // 2
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, N, 2], [32, 1, 1], [gl.num_warps(), 1, 1], [2, 1, 0]
    )
    pairs = gl.permute(gl.reshape(acc, [2, TILE, N]), [1, 2, 0])
    return gl.split(gl.convert_layout(pairs, layout))


@gluon.jit
def store_columns(out_ptr, value, slots, R, column, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """out[slot, column + m] = value[m, n] for the live slots; slots [BN] in SliceLayout(0)."""
    TILE: gl.constexpr = value.shape[0]
    live = (slots >= 0) & (slots < R)
    column += gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    row = gl.where(live, slots, 0).to(gl.int64) * WIDTH
    at = out_ptr + gl.expand_dims(row, 0) + gl.expand_dims(column, 1)
    value = gl.convert_layout(value.to(out_ptr.dtype.element_ty), LAYOUT)
    mask = gl.expand_dims(live, 0) & gl.expand_dims(column < WIDTH, 1)
    # The next launch reads what weights, streaming by, would push out of the L2.
    gl.store(at, value, mask, eviction_policy="evict_last")


@gluon.jit
def load_bias(bias_ptr, step, limit, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """bias[step * m] as fp32 [TILE, 1], 0 from m = limit on."""
    m = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    bias = gl.load(bias_ptr + step * m, mask=m < limit, other=0.0)
    return gl.expand_dims(bias.to(gl.float32), 1)
