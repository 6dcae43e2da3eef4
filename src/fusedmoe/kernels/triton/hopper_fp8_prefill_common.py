"""What the kernels of ``hopper_fp8_prefill`` do beside products: rings, tasks, scales, stores."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fusedmoe.kernels.triton.gluon_names import barrier, reinterpret
from fusedmoe.kernels.triton.hopper_common import known, tile_of_run
from fusedmoe.kernels.triton.hopper_fp8_prefill_multiply import BY_ROW, SUM
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    store_boxes,
    store_tile,
)
from fusedmoe.kernels.triton.quantize import quantized, scale_of

STEP = gl.constexpr(128)
BUFFER_WORDS = gl.constexpr(2048)  # an output buffer: 8 KiB
IN_ORDER = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
NO_TASK = gl.constexpr(-1)  # the word behind a program's last task
ONE_EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
BY_COLUMN = gl.constexpr(gl.SliceLayout(0, SUM.value))


@gluon.jit
def open_rings(
    w_desc, out_desc, STAGES: gl.constexpr, FILLERS: gl.constexpr, STEPPED: gl.constexpr
):
    """(rings, barriers, the output buffers of both warpgroups). Rings hold rows, weights and the
    rows' scales, of each step if STEPPED, or of each word in the box; FILLERS threads copy beside
    the TMA arrival. 8-bit results leave in one part per tile of 128 columns, others in two."""
    dtype: gl.constexpr = w_desc.dtype
    rings = (
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, STEP], w_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE_N, STEP], w_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES if STEPPED else 2, BLOCK_M], IN_ORDER),
    )
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
    return rings, (full, empty), out0, out1


@gluon.jit
def place(task, blocks, expert_ids_ptr, num_local, TILES: gl.constexpr, GROUP: gl.constexpr):
    """(block, column tile, expert) of a task."""
    block, tile, expert = tile_of_run(task, blocks, expert_ids_ptr, TILES, GROUP)
    return block, tile, known(expert, num_local)


@gluon.jit
def filled(block, sorted_ptr, R):
    """How far slots reach in a block, as n: no further than row 16 << n, 3: all of them. Places
    fill from the front."""
    n = 0
    for i in gl.static_range(3):
        slot = gl.load(sorted_ptr + block * BLOCK_M + (16 << i))
        n += gl.where((slot >= 0) & (slot < R), 1, 0)
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
    pointer, stride_expert, stride_row, shard_step, row_step, block = scales
    at = shard * shard_step + gl.minimum(feature, WIDTH - 1) // block * row_step
    return pointer + expert.to(gl.int64) * stride_expert + at * stride_row


@gluon.jit
def load_features(pointer, step, limit):
    """pointer[step * n] for n < TILE_N, one for each thread, 0 from n = limit on: to be asked for
    before the products, which take all registers but a few."""
    n = gl.arange(0, TILE_N, ONE_EACH)
    return gl.load(pointer + step * n, mask=n < limit, other=0.0).to(gl.float32)


@gluon.jit
def load_weight_scales(
    scale_ptr, expert, column, apart,
    STEP_BY: gl.constexpr, TO_HIGH: gl.constexpr, SHARDS: gl.constexpr,
    WIDTH: gl.constexpr, BY_FEATURE: gl.constexpr,
):  # fmt: skip
    """The scales of a tile's weight rows or, not BY_FEATURE, of its shards: (low's, high's).
    ``high`` lies ``apart`` columns further on; the scale of its column n is TO_HIGH behind that of
    low's."""
    at = scale_ptr + expert.to(gl.int64) * (SHARDS * (WIDTH if BY_FEATURE else 1))
    if BY_FEATURE:
        at += column * STEP_BY
        low = load_features(at, STEP_BY, WIDTH - column)
        return low, load_features(at + TO_HIGH, STEP_BY, WIDTH - column - apart)
    else:
        return gl.load(at).to(gl.float32), gl.load(at + (SHARDS - 1)).to(gl.float32)


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
def finished(
    low, high, row_scale, of_low, of_high, low_bias, high_bias, buffer,
    SCALED: gl.constexpr, BY_FEATURE: gl.constexpr, BIASED: gl.constexpr,
):  # fmt: skip
    """Both sums with the scales of their rows (None: contained) and weights if SCALED, and biases
    if BIASED: what ``load_features`` found, or one number each (not BY_FEATURE)."""
    if BIASED or (SCALED and BY_FEATURE):
        tma.store_wait(0)
        barrier()
        if SCALED and BY_FEATURE:
            put_features(buffer, of_low, 0)
            put_features(buffer, of_high, 1)
        if BIASED:
            put_features(buffer, low_bias, 2)
            put_features(buffer, high_bias, 3)
        barrier()
    if SCALED:
        if BY_FEATURE:
            of_low = get_features(buffer, 0)
            of_high = get_features(buffer, 1)
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
def store_whole(desc, buffer, value, row, column, rows):
    """TMA store of the first ``rows`` of [HALF_M, TILE_N], whole boxes of ``desc``, by way of a
    buffer that the store before has left."""
    tma.store_wait(0)
    barrier()
    buffer.store(value)
    fence_async_shared()
    barrier()
    store_boxes(desc, buffer, row, column, rows)


@gluon.jit
def store_rounded(
    out, act, row, column, rows, WIDTH: gl.constexpr, OWN: gl.constexpr, E8M0: gl.constexpr
):
    """act [HALF_M, TILE_N] in 8 bits: with scales OWN to these rows and columns, which are stored,
    or with the given one, whose inverse stands for their pointer. Columns from WIDTH on do not
    count."""
    desc, buffers, scale_ptr, P = out
    DTYPE: gl.constexpr = buffers.dtype
    if OWN:
        if WIDTH % TILE_N != 0:
            inside = column + gl.arange(0, TILE_N, BY_COLUMN) < WIDTH
            act = gl.where(gl.expand_dims(inside, 0), act, 0.0)
        scale = scale_of(act, 1, DTYPE, E8M0)
        at = (column // TILE_N).to(gl.int64) * P + row
        gl.store(scale_ptr + at + gl.arange(0, HALF_M, BY_ROW), scale)
        if gl.int8 == DTYPE:
            stored = quantized(act, gl.expand_dims(scale, 1), DTYPE)
        else:
            # Conversion to fp8 saturates.
            stored = (act * gl.expand_dims(1.0 / scale, 1)).to(DTYPE)
    elif gl.int8 == DTYPE:
        stored = quantized(act * scale_ptr, 1.0, DTYPE)
    else:
        stored = (act * scale_ptr).to(DTYPE)
    store_whole(desc, buffers.index(0), stored, row, column, rows)


@gluon.jit
def store_act(
    out, act, row, column, rows,
    WIDTH: gl.constexpr, ROUNDED: gl.constexpr, OWN: gl.constexpr, E8M0: gl.constexpr,
):  # fmt: skip
    if ROUNDED:
        if column < WIDTH:
            store_rounded(out, act, row, column, rows, WIDTH, OWN, E8M0)
    else:
        store_tile(out[0], out[1], act, row, column, rows)
