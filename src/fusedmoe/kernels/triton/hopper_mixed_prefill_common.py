"""What both kernels of ``hopper_mixed_prefill`` do besides products: the rings, what becomes of a
product's sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import barrier, tma_load, tma_store
from fusedmoe.kernels.triton.hopper_common import expert_at, known, tile_of_run
from fusedmoe.kernels.triton.hopper_mixed_numbers import (
    SIDE,
    STEP,
    boxes_of_step,
    has_minima,
    loads_of_stage,
    rest_of_sums,
    words_of_step,
)
from fusedmoe.kernels.triton.hopper_mixed_planes import plane_column
from fusedmoe.kernels.triton.hopper_mixed_scales import scale_rows
from fusedmoe.kernels.triton.hopper_mixed_sums import sides
from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.constexpr_function
def unit_of(SLOTS):
    """Slots of a block that are loaded and stored together."""
    return max(SLOTS // 2, 64)


@gluon.constexpr_function
def kinds_of(SLOTS):
    """What blocks are multiplied in, largest first: products of so many slots, and of so many
    behind them (0: none). Blocks of 256 have more than 128."""
    return {
        256: ((256, 0), (128, 64)),
        128: ((128, 0), (64, 0), (32, 0)),
        64: ((64, 0), (32, 0)),
    }[SLOTS]


@gluon.constexpr_function
def number_of_kinds(SLOTS):
    return len(kinds_of(SLOTS))


@gluon.constexpr_function
def first_of(SLOTS, KIND):
    return kinds_of(SLOTS)[KIND][0]


@gluon.constexpr_function
def rest_of(SLOTS, KIND):
    return kinds_of(SLOTS)[KIND][1]


@gluon.jit
def wait_for_previous(SHARE: gl.constexpr):
    """What tails read was complete before the launch of large blocks let theirs begin."""
    if SHARE != "tails":
        gdc_wait()
    gdc_launch_dependents()


@gluon.jit
def wait_at_the_end(SHARE: gl.constexpr):
    """The launch behind that of tails waits for that one alone."""
    if SHARE == "tails":
        gdc_wait()


@gluon.jit
def blocks_of(num_post_ptr, SLOTS: gl.constexpr, SHARE: gl.constexpr):
    """(first, how many) blocks a launch has to do with."""
    used = gl.load(num_post_ptr) // SLOTS
    if SHARE == "tails":
        return used, gl.load(num_post_ptr + 1) // SLOTS - used
    else:
        return used * 0, used


@gluon.jit
def expert_of(expert_ids_ptr, block, num_local, SHARE: gl.constexpr):
    """The table has an entry for every 128 slots where large blocks are not all."""
    return expert_at(expert_ids_ptr, block * 2 if SHARE == "large" else block, num_local)


@gluon.jit
def find_task(
    task, first_block, blocks, expert_ids_ptr, num_local,
    TILES: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """(place, block * TILES + column tile, of a task among this launch's; its block, column tile
    and expert)."""
    ENTRIES: gl.constexpr = 2 if SHARE == "large" else 1
    experts = expert_ids_ptr + first_block * ENTRIES
    block, tile, expert = tile_of_run(task, blocks, experts, TILES, GROUP, ENTRIES)
    return block * TILES + tile, first_block + block, tile, known(expert, num_local)


@gluon.constexpr_function
def room_of(ROWS):
    """Rows of words in the ring: views of TMA have a power of two."""
    return 128 if ROWS == 128 else 256


@gluon.jit
def open_rings(
    w_desc, out_desc, SLOTS: gl.constexpr, ROWS: gl.constexpr, LOADS: gl.constexpr,
    STAGES: gl.constexpr, STEPS: gl.constexpr, FILLERS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """((weights, rows), barriers, the output buffers of each warpgroup); a stage's words come in
    LOADS, and FILLERS threads gather beside the TMA arrival."""
    CONSUMERS: gl.constexpr = ROWS // (2 * SIDE)
    OUT: gl.constexpr = unit_of(SLOTS)
    BUFFERS: gl.constexpr = min(2, PARTS * (SLOTS // OUT))
    ROOM: gl.constexpr = room_of(ROWS)
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SLOTS, STEP], gl.bfloat16)
    rings = (
        gl.allocate_shared_memory(
            gl.int32, [STAGES * LOADS, ROOM, w_desc.block_shape[1]], w_desc.layout
        ),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES * STEPS, SLOTS, STEP], x_shared),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    out = ()
    for _ in gl.static_range(CONSUMERS):
        one = gl.allocate_shared_memory(out_desc.dtype, [BUFFERS, OUT, SIDE], out_desc.layout)
        out += (one,)  # type: ignore[assignment]
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + FILLERS)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    return rings, (full, empty), out


@gluon.jit
def kind_number(sorted_ptr, block, R, SLOTS: gl.constexpr):
    """Which of ``kinds_of`` a block is: the last that holds its slots; they fill from the front."""
    found = block * 0
    for kind in gl.static_range(1, number_of_kinds(SLOTS)):
        held = first_of(SLOTS, kind) + rest_of(SLOTS, kind)
        slot = gl.load(sorted_ptr + block * SLOTS + held)
        found += gl.where((slot >= 0) & (slot < R), 0, 1)
    return found


@gluon.jit
def load_words(
    descs, w_ring, stage, bar, row, below, k, ELEMENT: gl.constexpr, STEPS: gl.constexpr
):
    """TMA of a stage's words, of the steps from k on of a tile's weight rows: half of the rows from
    ``row`` on, half from ``row + below`` on."""
    HALF: gl.constexpr = w_ring.shape[1] // 2
    WORDS: gl.constexpr = w_ring.shape[2]
    BOXES: gl.constexpr = boxes_of_step(ELEMENT)
    LOADS: gl.constexpr = loads_of_stage(ELEMENT, STEPS)
    for load in gl.static_range(LOADS):
        words = w_ring.index(stage * LOADS + load)
        low, high = words.slice(0, HALF, 0), words.slice(HALF, HALF, 0)
        if has_minima(ELEMENT):
            column = plane_column(k + load // BOXES, load % BOXES, ELEMENT)
        else:
            column = k * words_of_step(ELEMENT) + load * WORDS
        tma_load(descs[0], [row, column], bar, low)
        tma_load(descs[1], [row + below, column], bar, high)


@gluon.jit
def load_bias(bias_ptr, at, inside):
    return gl.expand_dims(gl.load(bias_ptr + at, inside, 0.0).to(gl.float32), 1)


@gluon.jit
def finished(
    acc, scale_ptr, scale2_ptr, bias_ptr, scales, bias_steps, expert, first, N: gl.constexpr,
    D: gl.constexpr, ELEMENT: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """(low, high) [32, SLOTS] of a product's sums with the scales of whole rows, the second scale
    and the biases, whose steps from gate to up and from row to row are ``bias_steps``."""
    low, high = sides(acc)
    by_row: gl.constexpr = gl.SliceLayout(1, low.type.layout)
    r = gl.arange(0, SIDE, by_row)
    SHARD: gl.constexpr = 1 if GATED else 0
    if GROUP == 0:
        base, at_low = scale_rows(scales, expert, 0, first[0] + r, N, D, GROUP)
        base, at_high = scale_rows(scales, expert, SHARD, first[1] + r, N, D, GROUP)
        low *= gl.expand_dims(float_scale(gl.load(scale_ptr + base + at_low)), 1)
        high *= gl.expand_dims(float_scale(gl.load(scale_ptr + base + at_high)), 1)
    if rest_of_sums(ELEMENT) != 1:
        low *= rest_of_sums(ELEMENT)
        high *= rest_of_sums(ELEMENT)
    if scale2_ptr is not None:
        at = scale2_ptr + expert.to(gl.int64) * (SHARD + 1)
        low *= gl.load(at)
        high *= gl.load(at + SHARD)
    if bias_ptr is not None:
        to_shard, step = bias_steps
        at = bias_ptr + expert.to(gl.int64) * ((SHARD + 1) * N)
        low += load_bias(at, (first[0] + r) * step, first[0] + r < N)
        high += load_bias(at + SHARD * to_shard, (first[1] + r) * step, first[1] + r < N)
    return low, high


@gluon.jit
def store_side(desc, buffers, value, row, column, FIRST: gl.constexpr, IN_LANE_ORDER: gl.constexpr):
    """TMA store of value [32, SLOTS], slots as rows, a unit of them at a time, by way of this
    warpgroup's two buffers in turn, from number FIRST on; its columns as they are or
    IN_LANE_ORDER."""
    SLOTS: gl.constexpr = value.shape[1]
    UNIT: gl.constexpr = buffers.shape[1]
    value = value.to(buffers.dtype)
    if IN_LANE_ORDER:
        value = gl.reshape(value, [SIDE // 8, 2, 4, SLOTS])
        value = gl.reshape(gl.permute(value, [2, 0, 1, 3]), [SIDE, SLOTS])
    if SLOTS <= UNIT:
        # Where fewer are stored, what else the buffer holds goes to places that nobody reads.
        part = buffers.index(FIRST).slice(0, SLOTS, 0)
        store_unit(desc, buffers.index(FIRST), part, value, row, column, buffers.shape[0])
    else:
        parts = gl.permute(gl.reshape(value, [SIDE, 2, UNIT]), [0, 2, 1])
        left, right = gl.split(parts)
        store_unit(desc, buffers.index(0), buffers.index(0), left, row, column, 2)
        store_unit(desc, buffers.index(1), buffers.index(1), right, row + UNIT, column, 2)


@gluon.jit
def store_unit(desc, buffer, part, value, row, column, BUFFERS: gl.constexpr):
    """The part before the last has left its buffer when a part is written."""
    tma.store_wait(BUFFERS - 1)
    barrier()
    part.store(gl.permute(value, [1, 0]))
    fence_async_shared()
    barrier()
    tma_store(desc, [row, column], buffer)
