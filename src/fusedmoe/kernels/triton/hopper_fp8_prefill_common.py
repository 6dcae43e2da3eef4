"""What both kernels of ``hopper_fp8_prefill`` do: products of 8-bit operands, scales, the rings.

A step is 128 columns: 128 token rows and 256 weight rows, 48 KiB. A consumer warpgroup multiplies
64 rows by 128 weight rows at a time, ``low`` (gate) and then ``high`` (up).

Scales that change along the columns (``multiply_stepped``): every product is added to the fp32
sums with row scale x block scale, which is what keeps fp8 sums exact as well, because the tensor
cores add fp8 products in about 14 bits. Two sums and one product take 192 registers; two products
would not fit, so one warpgroup's additions overlap the other one's products.

Scales of whole rows (``multiply_whole``): one product of 256 weight rows per step runs through all
columns. int8 sums are exact; fp8 sums have the tensor cores' own precision, so rows of fp8 take the
other way, with a factor of one (PROMOTED), unless they are short.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_prefill_common import BLOCK_M, HALF_M, TILE_N

STEP = gl.constexpr(128)
SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
WIDE_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 32]))
BY_ROW = gl.constexpr(gl.SliceLayout(1, SUM.value))
BY_COLUMN = gl.constexpr(gl.SliceLayout(0, SUM.value))


@gluon.jit
def open_rings(w_desc, out_desc, STAGES: gl.constexpr, FILLERS: gl.constexpr):
    """(rings, barriers, the output buffers of both warpgroups); FILLERS threads gather beside the
    TMA arrival. 8-bit results leave in one part per tile of 128 columns, others in two."""
    dtype: gl.constexpr = w_desc.dtype
    rings = (
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, STEP], w_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE_N, STEP], w_desc.layout),
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
    """(block, column tile, expert) of a task: the columns of GROUP blocks, blocks innermost."""
    first = task // (GROUP * TILES) * GROUP
    rest = task - first * TILES
    size = gl.minimum(blocks - first, GROUP)
    block = first + rest % size
    expert = gl.load(expert_ids_ptr + block)
    return block, rest // size, gl.minimum(gl.maximum(expert, 0), num_local - 1)


@gluon.jit
def is_live(
    task, blocks, tables, R, num_local,
    TILES: gl.constexpr, GROUP: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Whether a task's rows of this warpgroup hold a slot: places fill from the front."""
    live = False
    if task < blocks * TILES:
        block, _, _ = place(task, blocks, tables[0], num_local, TILES, GROUP)
        slot = gl.load(tables[1] + block * BLOCK_M + WHICH * HALF_M)
        live = (slot >= 0) & (slot < R)
    return live


@gluon.jit
def skip(bars, stage, phase, KSTEPS: gl.constexpr, STAGES: gl.constexpr):
    """Give a tile's steps back unread."""
    full, empty = bars
    for _ in range(KSTEPS):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def multiply_stepped(
    rings, bars, stage, phase, live, row_scales, row_step, low_scales, high_scales,
    KSTEPS: gl.constexpr, PER_SCALE: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """One tile's (low, high), [HALF_M, TILE_N] fp32 each, scales included.

    ``row_scales`` [HALF_M] are pointers that advance by ``row_step`` per step, those to the
    weights' scales by one every PER_SCALE steps. None stands for factors of one.
    """
    a_ring, b_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = a_ring.shape[0]
    low = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
    high = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
    SCALED: gl.constexpr = row_scales is not None
    if live:
        if SCALED:
            row_scale = gl.load(row_scales, cache_modifier=".cg")
            low_scale = gl.load(low_scales).to(gl.float32)
            high_scale = gl.load(high_scales).to(gl.float32)
        for k in range(KSTEPS):
            mbarrier.wait(full.index(stage), phase)
            a = a_ring.index(stage).slice(WHICH * HALF_M, HALF_M, 0)
            b = b_ring.index(stage)
            part = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
            to_low = b.slice(0, TILE_N, 0).permute((1, 0))
            part = warpgroup_mma(a, to_low, part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            if SCALED:
                low += part * gl.expand_dims(row_scale * low_scale, 1)
            else:
                low += part
            part = gl.zeros([HALF_M, TILE_N], gl.float32, SUM)
            to_high = b.slice(TILE_N, TILE_N, 0).permute((1, 0))
            part = warpgroup_mma(a, to_high, part, use_acc=False, is_async=True)
            if SCALED:
                factor = gl.expand_dims(row_scale * high_scale, 1)
                ahead = gl.minimum(k + 1, KSTEPS - 1)
                row_scales += row_step
                row_scale = gl.load(row_scales, ahead > k, 0.0, cache_modifier=".cg")
                low_scale = gl.load(low_scales + ahead // PER_SCALE).to(gl.float32)
                high_scale = gl.load(high_scales + ahead // PER_SCALE).to(gl.float32)
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(stage), count=1)
            if SCALED:
                high += part * factor
            else:
                high += part
            stage, phase = next_stage(stage, phase, STAGES)
    else:
        stage, phase = skip(bars, stage, phase, KSTEPS, STAGES)
    return low, high, stage, phase


@gluon.jit
def multiply_whole(rings, bars, stage, phase, live, KSTEPS: gl.constexpr, WHICH: gl.constexpr):
    """One tile's (low, high), [HALF_M, TILE_N] fp32 each, without scales. Each step is freed when
    the next one has been issued."""
    a_ring, b_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = a_ring.shape[0]
    # Triton has no int8 product of 256 columns.
    WHOLE: gl.constexpr = a_ring.dtype == gl.int8
    NUMBER: gl.constexpr = gl.int32 if WHOLE else gl.float32
    acc = gl.zeros([HALF_M, 2 * TILE_N], NUMBER, SUM if WHOLE else WIDE_SUM)
    if live:
        for k in range(KSTEPS):
            mbarrier.wait(full.index(stage), phase)
            a = a_ring.index(stage).slice(WHICH * HALF_M, HALF_M, 0)
            acc = warpgroup_mma(a, b_ring.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            before = (stage + STAGES - 1) % STAGES
            mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
            stage, phase = next_stage(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
    else:
        stage, phase = skip(bars, stage, phase, KSTEPS, STAGES)
    pairs = gl.permute(gl.reshape(acc.to(gl.float32), [HALF_M, 2, TILE_N]), [0, 2, 1])
    low, high = gl.split(pairs)
    low = gl.convert_layout(low, SUM, assert_trivial=True)
    return low, gl.convert_layout(high, SUM, assert_trivial=True), stage, phase


@gluon.jit
def scale_row(scales, expert, shard, feature, WIDTH: gl.constexpr):
    """Where the scales of a weight row, or of many, begin; rows from WIDTH on repeat the last."""
    pointer, stride_expert, stride_row, shard_step, row_step, block = scales
    at = shard * shard_step + gl.minimum(feature, WIDTH - 1) // block * row_step
    return pointer + expert.to(gl.int64) * stride_expert + at * stride_row


@gluon.jit
def tile_columns():
    return gl.arange(0, TILE_N, BY_COLUMN)


@gluon.jit
def with_row_scales(low, high, scales, expert, row_scales, SHARD, column, apart,
                    WIDTH: gl.constexpr):  # fmt: skip
    """Both sums with the scales of their rows [HALF_M] and weight rows, loaded here. ``high`` is of
    shard SHARD and ``apart`` columns further on."""
    n = column + tile_columns()
    row_scale = gl.expand_dims(gl.load(row_scales, cache_modifier=".cg"), 1)
    of_low = gl.load(scale_row(scales, expert, 0, n, WIDTH)).to(gl.float32)
    of_high = gl.load(scale_row(scales, expert, SHARD, n + apart, WIDTH)).to(gl.float32)
    low = low * (row_scale * gl.expand_dims(of_low, 0))
    return low, high * (row_scale * gl.expand_dims(of_high, 0))


@gluon.jit
def load_bias(bias_ptr, step, limit):
    """bias[step * n] as fp32 [1, TILE_N], 0 from n = limit on."""
    n = tile_columns()
    bias = gl.load(bias_ptr + step * n, mask=n < limit, other=0.0)
    return gl.expand_dims(bias.to(gl.float32), 0)


@gluon.jit
def store_whole(desc, buffer, value, row, column):
    """TMA store of [HALF_M, TILE_N] by way of a buffer that the store before has left."""
    tma.store_wait(0)
    gl.thread_barrier()
    buffer.store(value)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, [row, column], buffer)
