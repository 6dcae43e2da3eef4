"""What both kernels of ``hopper_prefill`` do: the order of tiles, products, stores, the rings."""

from dataclasses import dataclass
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmoe.kernels.triton.gluon_names import barrier, tma_store
from fusedmoe.kernels.triton.hopper_common import known, next_stage, tile_of_run
from fusedmoe.kernels.triton.hopper_drawn import announce, hear

BLOCK_M = gl.constexpr(128)
HALF_M = gl.constexpr(64)
TILE_N = gl.constexpr(128)
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
PART_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
HALF_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@dataclass(frozen=True)
class Case:
    """What is constant in a launch: products of D columns with the weights of N features, in tiles
    of their own for gate and up if GATED, otherwise in two of neighbours. The ring has STAGES;
    GROUP_M blocks share weights in the L2.

    No tuple, which Triton would take apart into numbers of run time. A string of it needs a name of
    its own where it is passed on.
    """

    N: int
    D: int
    STAGES: int
    GROUP_M: int
    FORMULA: str = ""
    GATED: bool = False
    INTERLEAVED: bool = False
    PICKS: int = 1
    WORLD: int = 1


class Ring(NamedTuple):
    """STAGES steps of rows and of weights in shared memory, and the barriers of each step."""

    rows: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.constexpr_function
def wide_of(CASE):
    """Features of a tile."""
    return TILE_N.value if CASE.GATED else 2 * TILE_N.value


@gluon.constexpr_function
def below_of(CASE):
    """Features between both weight tiles of a tile."""
    return 0 if CASE.GATED else TILE_N.value


@gluon.constexpr_function
def tiles_of(CASE):
    """Tiles that all features make."""
    return -(-CASE.N // wide_of(CASE))


@gluon.jit
def place(task, blocks, tables, CASE: gl.constexpr):
    """(block, column tile, expert) of a task."""
    TILES: gl.constexpr = tiles_of(CASE)
    block, tile, expert = tile_of_run(task, blocks, tables.experts, TILES, CASE.GROUP_M)
    return block, tile, known(expert, tables.num_local)


@gluon.jit
def announce_half(box, number, at, whole):
    """Announce a place, block * TILES + tile, and whether both halves of the block hold slots."""
    announce(box, number, 2 * at + gl.where(whole, 1, 0))


@gluon.jit
def hear_half(box, number, WHICH: gl.constexpr):
    """(place, whether this half of its block holds a slot), as announced."""
    word = hear(box, number)
    return word // 2, (word % 2 == 1) | (WHICH == 0)


@gluon.jit
def multiply(ring, stage, phase, live, KSTEPS: gl.constexpr, WHICH: gl.constexpr):
    """Products of one tile, [HALF_M, 2 * TILE_N]: rows of this warpgroup times both weight tiles.

    Each step is freed when the next one has been issued.
    """
    STAGES: gl.constexpr = ring.rows.shape[0]
    acc = gl.zeros([HALF_M, 2 * TILE_N], gl.float32, ACC)
    if live:
        for k in range(KSTEPS):
            mbarrier.wait(ring.full.index(stage), phase)
            a = ring.rows.index(stage).slice(WHICH * HALF_M, HALF_M, 0)
            acc = warpgroup_mma(a, ring.weights.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            before = (stage + STAGES - 1) % STAGES
            mbarrier.arrive(ring.empty.index(before), count=1, pred=k > 0)
            stage, phase = next_stage(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(ring.empty.index((stage + STAGES - 1) % STAGES), count=1)
    else:
        for _ in range(KSTEPS):
            mbarrier.wait(ring.full.index(stage), phase)
            mbarrier.arrive(ring.empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def halves(acc):
    """The products with the first and with the second weight tile; moves no data."""
    low, high = gl.split(gl.permute(gl.reshape(acc, [HALF_M, 2, TILE_N]), [0, 2, 1]))
    return (
        gl.convert_layout(low, HALF_ACC, assert_trivial=True),
        gl.convert_layout(high, HALF_ACC, assert_trivial=True),
    )


@gluon.jit
def store_tile(desc, buffers, value, row, column, rows=HALF_M):
    """TMA store of the first ``rows`` of [HALF_M, TILE_N], whole boxes of ``desc``, in two parts,
    by way of this warpgroup's two buffers in turn: the part before the last has left its buffer
    when a part is written."""
    PART: gl.constexpr = buffers.shape[2]
    parts = gl.permute(gl.reshape(value.to(buffers.dtype), [HALF_M, 2, PART]), [0, 2, 1])
    left, right = gl.split(parts)
    store_part(desc, buffers.index(0), gl.convert_layout(left, PART_ACC), row, column, rows)
    right = gl.convert_layout(right, PART_ACC)
    store_part(desc, buffers.index(1), right, row, column + PART, rows)


@gluon.jit
def store_part(desc, buffer, value, row, column, rows):
    fill_buffer(buffer, value, 1)
    store_boxes(desc, buffer, row, column, rows)


@gluon.jit
def fill_buffer(buffer, value, PENDING: gl.constexpr):
    """Write what TMA will store, once all but the last PENDING stores have left their buffers."""
    tma.store_wait(PENDING)
    barrier()
    buffer.store(value)
    fence_async_shared()
    barrier()


@gluon.jit
def store_boxes(desc, buffer, row, column, rows):
    BOX: gl.constexpr = desc.block_shape[0]
    for first in gl.static_range(0, HALF_M, BOX):
        if first < rows:
            part = buffer.slice(first, BOX, 0)
            tma_store(desc, [row + first, column], part)


@gluon.jit
def is_whole(block, tables):
    """Whether both halves of a block hold slots: places fill from the front."""
    slot = gl.load(tables.slots + block * BLOCK_M + HALF_M)
    return (slot >= 0) & (slot < tables.R)


@gluon.jit
def expect_step(bar, whole, BYTES: gl.constexpr):
    """What TMA brings in one step, of BYTES a row: weights, and rows of the block's live halves."""
    mbarrier.expect(bar, (2 * TILE_N + BLOCK_M) * BYTES, pred=whole)
    mbarrier.expect(bar, (2 * TILE_N + HALF_M) * BYTES, pred=~whole)


@gluon.jit
def load_bias(bias_ptr, step, limit):
    """bias[step * n] as fp32 [1, TILE_N], 0 from n = limit on."""
    n = gl.arange(0, TILE_N, gl.SliceLayout(0, HALF_ACC))
    bias = gl.load(bias_ptr + step * n, mask=n < limit, other=0.0)
    return gl.expand_dims(bias.to(gl.float32), 0)


@gluon.jit
def open_ring(desc, STAGES: gl.constexpr, FILLERS: gl.constexpr):
    """(ring, the output buffers of both warpgroups); FILLERS threads gather beside the TMA
    arrival."""
    dtype: gl.constexpr = desc.dtype
    BK: gl.constexpr = desc.block_shape[1]
    a_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BK], dtype)
    PART: gl.constexpr = TILE_N // 2
    out_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF_M, PART], dtype)
    rows = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BK], a_shared)
    weights = gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE_N, BK], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    out0 = gl.allocate_shared_memory(dtype, [2, HALF_M, PART], out_shared)
    out1 = gl.allocate_shared_memory(dtype, [2, HALF_M, PART], out_shared)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + FILLERS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    return Ring(rows, weights, full, empty), out0, out1
