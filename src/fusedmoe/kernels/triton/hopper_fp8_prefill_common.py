"""What both kernels of ``hopper_fp8_prefill`` do beside products: the ring, tasks, scales."""

from dataclasses import dataclass
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fusedmoe.kernels.triton.gluon_names import barrier, reinterpret
from fusedmoe.kernels.triton.hopper_fp8_prefill_multiply import (
    STEP,
    SUM,
    multiply,
    open_turns,
)
from fusedmoe.kernels.triton.hopper_prefill_common import BLOCK_M, HALF_M, TILE_N, Case, below_of

BUFFER_WORDS = gl.constexpr(2048)  # an output buffer: 8 KiB
IN_ORDER = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
NO_TASK = gl.constexpr(-1)  # the word behind a program's last task
ONE_EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
BY_COLUMN = gl.constexpr(gl.SliceLayout(0, SUM.value))


@dataclass(frozen=True, kw_only=True)
class BytesCase(Case):
    """STEPPED: scales of rows change from step to step. PROMOTED: products of so many steps are
    added to the sums at a time (0: all). PER_SCALE: so many steps share a scale of the weights; 0:
    all of them, and scales belong to weight rows (BY_FEATURE) or shards. OWN: act gets scales of
    its own, powers of two if E8M0."""

    STEPPED: bool
    PROMOTED: int
    PER_SCALE: int
    BY_FEATURE: bool
    OWN: bool = False
    E8M0: bool = False


class Ring(NamedTuple):
    """As ``hopper_prefill_common.Ring``; the scales of rows, of each step if STEPPED, or of each
    word in the box; and the barriers of ``open_turns``."""

    rows: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    turns: gl.shared_memory_descriptor


@gluon.jit
def open_ring(w_desc, out_desc, FILLERS: gl.constexpr, CASE: gl.constexpr):
    """(ring, the output buffers of both warpgroups). FILLERS threads copy beside the TMA arrival.
    8-bit results leave in one part per tile of 128 columns, others in two."""
    STAGES: gl.constexpr = CASE.STAGES
    SCALES: gl.constexpr = STAGES if CASE.STEPPED else 2
    dtype: gl.constexpr = w_desc.dtype
    rows = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, STEP], w_desc.layout)
    weights = gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE_N, STEP], w_desc.layout)
    scales = gl.allocate_shared_memory(gl.float32, [SCALES, BLOCK_M], IN_ORDER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kind: gl.constexpr = out_desc.dtype
    PARTS: gl.constexpr = TILE_N // out_desc.block_shape[1]
    out0 = gl.allocate_shared_memory(kind, [PARTS, HALF_M, TILE_N // PARTS], out_desc.layout)
    out1 = gl.allocate_shared_memory(kind, [PARTS, HALF_M, TILE_N // PARTS], out_desc.layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + FILLERS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    return Ring(rows, weights, scales, full, empty, open_turns(CASE)), out0, out1


@gluon.jit
def filled(block, tables):
    """How far slots reach in a block, as n: no further than row 16 << n, 3: all of them. Places
    fill from the front."""
    n = 0
    for i in gl.static_range(3):
        slot = gl.load(tables.slots + block * BLOCK_M + (16 << i))
        n += gl.where((slot >= 0) & (slot < tables.R), 1, 0)
    return n


@gluon.jit
def expect_step(bar, n, BOX: gl.constexpr):
    """What TMA brings in one step of ``down_kernel``: weights, and as many rows of act as are
    ``filled``, whole boxes of them."""
    if BOX == HALF_M:
        mbarrier.expect(bar, (2 * TILE_N + HALF_M) * STEP, pred=n < 3)
        mbarrier.expect(bar, (2 * TILE_N + BLOCK_M) * STEP, pred=n == 3)
    else:
        for i in gl.static_range(4):
            mbarrier.expect(bar, (2 * TILE_N + (16 << i)) * STEP, pred=n == i)


@gluon.jit
def packed(block, tile, expert, n):
    """One word of all that consumers ask of a task, so that they wait for no load; it is not
    negative. Of ``tile`` it holds 18 bits, of ``block`` 24."""
    low = tile * 4 + n
    return (expert.to(gl.int64) << 44) | (block.to(gl.int64) << 20) | low.to(gl.int64)


@gluon.jit
def unpacked(word, WHICH: gl.constexpr):
    """(this warpgroup's first row, column tile, expert, how many of its rows may hold slots)."""
    row = ((word >> 20) & 0xFFFFFF).to(gl.int32) * BLOCK_M + WHICH * HALF_M
    tile = ((word >> 2) & 0x3FFFF).to(gl.int32)
    n = (word & 3).to(gl.int32)
    rows = gl.minimum(16 << n, HALF_M) if WHICH == 0 else gl.where(n == 3, HALF_M, 0)
    return row, tile, (word >> 44).to(gl.int32), rows


@gluon.jit
def scale_row(scales, expert, shard, feature, WIDTH: gl.constexpr):
    """Where the scales of a weight row, or of many, begin; rows from WIDTH on repeat the last."""
    at = shard * scales.shard_step
    at += gl.minimum(feature, WIDTH - 1) // scales.block * scales.row_step
    return scales.pointer + expert.to(gl.int64) * scales.stride_expert + at * scales.stride_row


@gluon.jit
def load_features(pointer, step, limit):
    """pointer[step * n] for n < TILE_N, one for each thread, 0 from n = limit on: to be asked for
    before the products, which take all registers but a few."""
    n = gl.arange(0, TILE_N, ONE_EACH)
    return gl.load(pointer + step * n, mask=n < limit, other=0.0).to(gl.float32)


@gluon.constexpr_function
def shards_of(CASE):
    return 2 if CASE.GATED else 1


@gluon.constexpr_function
def step_of(CASE):
    """How far the next feature of the same shard lies, among those of all shards."""
    return 2 if CASE.INTERLEAVED else 1


@gluon.constexpr_function
def to_high_of(CASE):
    """How far a feature of the low half lies from its partner in the high half."""
    if CASE.GATED:
        return 1 if CASE.INTERLEAVED else CASE.N
    return TILE_N.value


@gluon.jit
def load_both(pointer, column, CASE: gl.constexpr):
    """``load_features`` of low and of high from ``column`` on; ``pointer`` is the expert's."""
    at = pointer + column * step_of(CASE)
    low = load_features(at, step_of(CASE), CASE.N - column)
    at += to_high_of(CASE)
    return low, load_features(at, step_of(CASE), CASE.N - column - below_of(CASE))


@gluon.jit
def load_weight_scales(pointer, expert, column, CASE: gl.constexpr):
    """The scales of a tile's weight rows or, not BY_FEATURE, of its shards: (low's, high's)."""
    EACH: gl.constexpr = CASE.N if CASE.BY_FEATURE else 1
    at = pointer + expert.to(gl.int64) * (shards_of(CASE) * EACH)
    if CASE.BY_FEATURE:
        return load_both(at, column, CASE)
    else:
        return gl.load(at).to(gl.float32), gl.load(at + (shards_of(CASE) - 1)).to(gl.float32)


@gluon.jit
def put_features(buffer, found, AT: gl.constexpr):
    """Leave what ``load_features`` found in an output buffer of this warpgroup, for
    ``get_features`` behind a barrier."""
    words = reinterpret(buffer, gl.float32, [BUFFER_WORDS], IN_ORDER)
    words.slice(AT * TILE_N, TILE_N).store(found)


@gluon.jit
def get_features(buffer, AT: gl.constexpr):
    """[1, TILE_N] beside the sums."""
    words = reinterpret(buffer, gl.float32, [BUFFER_WORDS], IN_ORDER)
    return gl.expand_dims(words.slice(AT * TILE_N, TILE_N).load(BY_COLUMN), 0)


@gluon.jit
def finished(low, high, row_scale, of_weights, biases, buffer, CASE: gl.constexpr):
    """Both sums with the scales of their rows (None: contained) and of weights, unless the products
    have them, and biases, if any: what ``load_features`` found of low and of high, or one number
    each (not BY_FEATURE)."""
    BIASED: gl.constexpr = len(biases) != 0
    FEATURES: gl.constexpr = CASE.PER_SCALE == 0 and CASE.BY_FEATURE
    if BIASED or FEATURES:
        tma.store_wait(0)
        barrier()
        if FEATURES:
            put_features(buffer, of_weights[0], 0)
            put_features(buffer, of_weights[1], 1)
        if BIASED:
            put_features(buffer, biases[0], 2)
            put_features(buffer, biases[1], 3)
        barrier()
    if CASE.PER_SCALE == 0:
        if FEATURES:
            of_low = get_features(buffer, 0)
            of_high = get_features(buffer, 1)
        else:
            of_low, of_high = of_weights
        if row_scale is not None:
            of_low *= gl.expand_dims(row_scale, 1)
            of_high *= gl.expand_dims(row_scale, 1)
        low *= of_low
        high *= of_high
    if BIASED:
        low += get_features(buffer, 2)
        high += get_features(buffer, 3)
    return low, high


@gluon.jit
def tile_sums(
    ring, stage, phase, turn, scales, bias_ptr, row_scale, expert, column, buffer,
    CASE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """(low, high) of one tile with all scales, those of rows from ``row_scale`` or (None) the ring,
    and biases; what these need is asked for before the products."""
    low_scales = None
    high_scales = None
    of_weights = ()
    biases = ()
    if CASE.PER_SCALE > 0:
        SHARD: gl.constexpr = shards_of(CASE) - 1
        low_scales = scale_row(scales, expert, 0, column, CASE.N)
        high_scales = scale_row(scales, expert, SHARD, column + below_of(CASE), CASE.N)
    else:
        of_weights = load_weight_scales(scales.pointer, expert, column, CASE)
    if bias_ptr is not None:
        at = bias_ptr + expert.to(gl.int64) * (shards_of(CASE) * CASE.N)
        biases = load_both(at, column, CASE)
    low, high, stage, phase, turn = multiply(
        ring, stage, phase, turn, low_scales, high_scales, CASE, WHICH
    )
    low, high = finished(low, high, row_scale, of_weights, biases, buffer, CASE)
    return low, high, stage, phase, turn
