"""What both kernels of ``hopper_mixed_prefill`` do besides products: fill rings and store sums."""

from dataclasses import dataclass
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import tma_load, tma_store
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
from fusedmoe.kernels.triton.hopper_prefill_common import Case, fill_buffer
from fusedmoe.kernels.triton.quantized_common import float_scale


@dataclass(frozen=True, kw_only=True)
class MixedCase(Case):
    """Products of ROWS of the weights with SLOTS slots; GATED: half of the rows are gate's, half
    up's. Numbers are of type ELEMENT, GROUP columns of which share a scale (0: a row does). A stage
    has STEPS steps. SHARE: "all" blocks, "large" ones or "tails". ORDERED: the results' columns are
    in ``lane_order``."""

    ELEMENT: str
    GROUP: int
    ROWS: int
    SLOTS: int
    STEPS: int
    SHARE: str
    ORDERED: bool = False


class Ring(NamedTuple):
    """STAGES of words of weights and of rows in shared memory, and the barriers of each."""

    words: gl.shared_memory_descriptor
    rows: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.constexpr_function
def wide_of(CASE):
    """Features of a tile."""
    return CASE.ROWS // 2 if CASE.GATED else CASE.ROWS


@gluon.constexpr_function
def tiles_of(CASE):
    """Tiles that all features make."""
    return -(-CASE.N // wide_of(CASE))


@gluon.constexpr_function
def unit_of(SLOTS):
    """Slots of a block that are loaded and stored together."""
    return max(SLOTS // 2, 64)


@gluon.constexpr_function
def kinds_of(SLOTS):
    """The ways to multiply a block, largest first: (slots of its first product, slots of a second
    one behind them or 0). Blocks of 256 have more than 128."""
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
def wait_for_previous(CASE: gl.constexpr):
    """Tails need not wait: what they read was complete before the launch of large blocks let them
    begin."""
    if CASE.SHARE != "tails":
        gdc_wait()
    gdc_launch_dependents()


@gluon.jit
def wait_at_the_end(CASE: gl.constexpr):
    """The launch behind that of tails waits for that one alone."""
    if CASE.SHARE == "tails":
        gdc_wait()


@gluon.jit
def blocks_of(tables, CASE: gl.constexpr):
    """(first, how many) blocks a launch has to do with."""
    used = gl.load(tables.num_post) // CASE.SLOTS
    if CASE.SHARE == "tails":
        return used, gl.load(tables.num_post + 1) // CASE.SLOTS - used
    else:
        return used * 0, used


@gluon.jit
def expert_of(tables, block, CASE: gl.constexpr):
    """The table has an entry for every 128 slots where large blocks are not all."""
    at = block * 2 if CASE.SHARE == "large" else block
    return expert_at(tables.experts, at, tables.num_local)


@gluon.jit
def find_task(task, first_block, blocks, tables, CASE: gl.constexpr):
    """(place, block * TILES + column tile, of a task among this launch's; its block, column tile
    and expert)."""
    TILES: gl.constexpr = tiles_of(CASE)
    GROUP: gl.constexpr = CASE.GROUP_M
    ENTRIES: gl.constexpr = 2 if CASE.SHARE == "large" else 1
    experts = tables.experts + first_block * ENTRIES
    block, tile, expert = tile_of_run(task, blocks, experts, TILES, GROUP, ENTRIES)
    return block * TILES + tile, first_block + block, tile, known(expert, tables.num_local)


@gluon.constexpr_function
def room_of(ROWS):
    """Rows of words in the ring: views of TMA have a power of two."""
    return 128 if ROWS == 128 else 256


@gluon.jit
def open_ring(w_desc, out_desc, FILLERS: gl.constexpr, CASE: gl.constexpr):
    """(ring, the output buffers of each warpgroup); FILLERS threads gather beside the TMA
    arrival."""
    SLOTS: gl.constexpr = CASE.SLOTS
    STAGES: gl.constexpr = CASE.STAGES
    CONSUMERS: gl.constexpr = CASE.ROWS // (2 * SIDE)
    OUT: gl.constexpr = unit_of(SLOTS)
    PARTS: gl.constexpr = 1 if CASE.GATED else 2
    BUFFERS: gl.constexpr = min(2, PARTS * (SLOTS // OUT))
    BOXES: gl.constexpr = STAGES * loads_of_stage(CASE.ELEMENT, CASE.STEPS)
    shape: gl.constexpr = [BOXES, room_of(CASE.ROWS), w_desc.block_shape[1]]
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SLOTS, STEP], gl.bfloat16)
    words = gl.allocate_shared_memory(gl.int32, shape, w_desc.layout)
    rows = gl.allocate_shared_memory(gl.bfloat16, [STAGES * CASE.STEPS, SLOTS, STEP], x_shared)
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
    return Ring(words, rows, full, empty), out


@gluon.jit
def kind_number(tables, block, SLOTS: gl.constexpr):
    """Which of ``kinds_of`` a block is: the last that holds its slots; they fill from the front."""
    found = block * 0
    for kind in gl.static_range(1, number_of_kinds(SLOTS)):
        held = first_of(SLOTS, kind) + rest_of(SLOTS, kind)
        slot = gl.load(tables.slots + block * SLOTS + held)
        found += gl.where((slot >= 0) & (slot < tables.R), 0, 1)
    return found


@gluon.jit
def load_words(descs, ring, stage, row, k, CASE: gl.constexpr):
    """TMA of a stage's words, of the steps from k on of a tile's weight rows: half of the rows from
    ``row`` on, half further below or, GATED, in the other view."""
    ELEMENT: gl.constexpr = CASE.ELEMENT
    HALF: gl.constexpr = ring.words.shape[1] // 2
    BELOW: gl.constexpr = 0 if CASE.GATED else HALF
    WORDS: gl.constexpr = ring.words.shape[2]
    BOXES: gl.constexpr = boxes_of_step(ELEMENT)
    LOADS: gl.constexpr = loads_of_stage(ELEMENT, CASE.STEPS)
    bar = ring.full.index(stage)
    for load in gl.static_range(LOADS):
        words = ring.words.index(stage * LOADS + load)
        low, high = words.slice(0, HALF, 0), words.slice(HALF, HALF, 0)
        if has_minima(ELEMENT):
            column = plane_column(k + load // BOXES, load % BOXES, ELEMENT)
        else:
            column = k * words_of_step(ELEMENT) + load * WORDS
        tma_load(descs[0], [row, column], bar, low)
        tma_load(descs[1], [row + BELOW, column], bar, high)


@gluon.jit
def load_bias(bias_ptr, at, inside):
    return gl.expand_dims(gl.load(bias_ptr + at, inside, 0.0).to(gl.float32), 1)


@gluon.constexpr_function
def bytes_of_stage(ring_shape, CASE):
    """Bytes of a stage's words, of all rows."""
    return loads_of_stage(CASE.ELEMENT, CASE.STEPS) * ring_shape[1] * ring_shape[2] * 4


@gluon.jit
def finished(acc, weights, expert, first, CASE: gl.constexpr):
    """(low, high) [32, SLOTS] of a product's sums with the scales of whole rows, the second scale
    and the biases."""
    low, high = sides(acc)
    by_row: gl.constexpr = gl.SliceLayout(1, low.type.layout)
    r = gl.arange(0, SIDE, by_row)
    SHARD: gl.constexpr = 1 if CASE.GATED else 0
    if CASE.GROUP == 0:
        base, at_low = scale_rows(weights, expert, 0, first[0] + r, CASE)
        base, at_high = scale_rows(weights, expert, SHARD, first[1] + r, CASE)
        low *= gl.expand_dims(float_scale(gl.load(weights.scale + base + at_low)), 1)
        high *= gl.expand_dims(float_scale(gl.load(weights.scale + base + at_high)), 1)
    REST: gl.constexpr = rest_of_sums(CASE.ELEMENT)
    if REST != 1:
        low *= REST
        high *= REST
    if weights.scale2 is not None:
        at = weights.scale2 + expert.to(gl.int64) * (SHARD + 1)
        low *= gl.load(at)
        high *= gl.load(at + SHARD)
    if weights.bias is not None:
        N: gl.constexpr = CASE.N
        BY: gl.constexpr = 2 if CASE.INTERLEAVED else 1
        TO_UP: gl.constexpr = 1 if CASE.INTERLEAVED else N
        at = weights.bias + expert.to(gl.int64) * ((SHARD + 1) * N)
        low += load_bias(at, (first[0] + r) * BY, first[0] + r < N)
        high += load_bias(at + SHARD * TO_UP, (first[1] + r) * BY, first[1] + r < N)
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
        # With fewer slots, the rest of the buffer is stored to places that nobody reads.
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
    fill_buffer(part, gl.permute(value, [1, 0]), BUFFERS - 1)
    tma_store(desc, [row, column], buffer)
