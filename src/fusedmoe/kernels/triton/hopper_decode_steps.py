"""Which task comes next in ``hopper_decode``, where it is, and when its rows are there.

Counters lie in the padding of the table of slots (``kernels.hopper_decode.decode_table``), which
holds R at first: a word for the tasks that the programs of each launch have drawn,
then one per block for the tiles of its rows of act that are in memory.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.hopper_decode import DRAW_WORDS
from fusedmoe.kernels.triton.gluon_names import barrier
from fusedmoe.kernels.triton.hopper_common import known, slots_of, tile_of
from fusedmoe.kernels.triton.hopper_drawn import draw

FIRST_BLOCK = gl.constexpr(DRAW_WORDS)


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """What is constant in a launch: products of D columns with the weights of N features, WIDE of
    them a tile, for blocks of SLOTS slots, of which PICKS share a row. The ring has STAGES steps of
    DEPTH columns. GROUP of one expert's blocks share its weights.

    DRAWN: up_kernel's programs draw their tasks. COUNTED: it counts the tiles of act that are in
    memory, and down_kernel waits until a block has UP_TILES of them.
    """

    N: int
    D: int
    WIDE: int
    SLOTS: int
    DEPTH: int
    STAGES: int
    GROUP: int = 1
    PICKS: int = 1
    FORMULA: str = ""
    GATED: bool = False
    INTERLEAVED: bool = False
    DRAWN: bool = False
    COUNTED: bool = False
    UP_TILES: int = 0


@gluon.constexpr_function
def steps_of(CASE):
    """Steps that a task takes."""
    return -(-CASE.D // CASE.DEPTH)


@gluon.constexpr_function
def tiles_of(CASE):
    """Tiles that all features make."""
    return -(-CASE.N // CASE.WIDE)


@gluon.constexpr_function
def one_ahead(CASE):
    """Whether a ring holds no more than one task, so that one alone is ahead of the products."""
    return steps_of(CASE) >= CASE.STAGES


@gluon.jit
def follow_step(task, k, drawn, counter_ptr, R, KSTEPS: gl.constexpr, DRAWN: gl.constexpr):
    """(task, step, drawn) after step k of ``task``. DRAWN: ``drawn`` follows it, which was drawn
    half a task before, so that nothing waits for it."""
    k += 1
    if DRAWN:  # noqa: SIM102 (Triton does not short-circuit)
        if k == (KSTEPS + 1) // 2:
            drawn = draw(counter_ptr, R)
    if k == KSTEPS:
        k = 0
        if DRAWN:
            task = drawn
        else:
            task += gl.num_programs(0)
    return task, k, drawn


@gluon.jit
def find_task(task, blocks, tables, CASE: gl.constexpr, LAYOUT: gl.constexpr):
    """(block, column tile, expert, slots [SLOTS] in LAYOUT) of a task: groups of GROUP blocks or,
    one task ahead, block by block, but those of one expert in a window of GROUP places side by
    side. Few blocks have such a neighbour, so their slots are asked for at once with what tells.
    ``blocks`` may then count places whose expert is -1."""
    GROUP: gl.constexpr = CASE.GROUP
    TILES: gl.constexpr = tiles_of(CASE)
    TOGETHER: gl.constexpr = one_ahead(CASE)
    if TOGETHER:
        block = task // TILES
        tile = task % TILES
    else:
        block, tile = tile_of(task, blocks, TILES, GROUP)
    expert = gl.load(tables.experts + block, cache_modifier=".cg")
    slots = slots_of(block, tables.slots, CASE.SLOTS, LAYOUT)
    if TOGETHER:
        own = tables.experts + block
        before = gl.load(own - 1, mask=block > 0, other=-2, cache_modifier=".cg")
        after = gl.load(own + 1, mask=block + 1 < blocks, other=-2, cache_modifier=".cg")
        if (before == expert) | (after == expert):
            begin = block // GROUP * GROUP
            place = gl.arange(0, GROUP, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
            place += begin
            inside = place < blocks
            others = gl.load(tables.experts + place, mask=inside, other=-2, cache_modifier=".cg")
            other = others != expert
            first = gl.max(gl.where(other & (place < block), place + 1, begin), 0)
            size = gl.min(gl.where(other & (place > block), place, begin + GROUP), 0) - first
            rest = task - first * TILES
            block = first + rest % size
            tile = rest // size
            slots = slots_of(block, tables.slots, CASE.SLOTS, LAYOUT)
    return block, tile, known(expert, tables.num_local), slots


@gluon.jit
def count_tile(counters_ptr, block):
    """Say that a tile of the block's rows is in memory, which all threads have stored to."""
    barrier()
    gl.atomic_add(counters_ptr + FIRST_BLOCK + block, 1, sem="release")


@gluon.jit
def read_count(counter_ptr):
    """What this thread reads afterwards was there when the count was."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];",
        "=r,l",
        [counter_ptr.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_for_tiles(counters_ptr, block, count):
    """Wait until the block's tiles have been counted, from R to ``count``."""
    counter_ptr = counters_ptr + FIRST_BLOCK + block
    while read_count(counter_ptr) < count:
        pass
