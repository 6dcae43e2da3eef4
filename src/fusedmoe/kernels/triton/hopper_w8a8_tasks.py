"""The weights' side of ``hopper_w8a8``: tasks, their ring, and the scales of their rows.

A task is (block of slots, tile of weight rows); tasks go round robin over the programs. The ring
never drains between them; a stage is DEPTH steps of 128 bytes of two times HALF rows, of which
VALID are loaded.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import known, tiles_of, wide_of
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP

LINE_WORDS = gl.constexpr(32)


@gluon.constexpr_function
def stages_of(CASE):
    """Stages that a task takes."""
    return -(-CASE.D // (CASE.DEPTH * STEP.value))


@gluon.jit
def stored_expert(task, tasks, experts_ptr, TILES: gl.constexpr):
    """The table's expert for a task's block; for any block where the task does not exist."""
    block = gl.maximum(gl.minimum(task, tasks - 1), 0) // TILES
    return gl.load(experts_ptr + block, cache_modifier=".cg")


@gluon.jit
def first_tasks(COUNT: gl.constexpr):
    """The tasks that fill the ring at first."""
    queue = (gl.program_id(0),)
    for i in gl.static_range(1, COUNT):
        queue += (gl.program_id(0) + i * gl.num_programs(0),)  # type: ignore[assignment]
    return queue


@gluon.jit
def experts_of(queue, tasks, experts_ptr, TILES: gl.constexpr):
    experts = (stored_expert(queue[0], tasks, experts_ptr, TILES),)
    for i in gl.static_range(1, len(queue)):
        experts += (stored_expert(queue[i], tasks, experts_ptr, TILES),)  # type: ignore[assignment]
    return experts


@gluon.jit
def guessed_experts(queue, num_local, TILES: gl.constexpr):
    """The same as if every expert had one block."""
    experts = (gl.minimum(queue[0] // TILES, num_local - 1),)
    for i in gl.static_range(1, len(queue)):
        experts += (gl.minimum(queue[i] // TILES, num_local - 1),)  # type: ignore[assignment]
    return experts


@gluon.jit
def are_all(experts, guess, queue, tasks):
    """Whether these are the experts of the queue, and all of its tasks exist."""
    right = queue[len(queue) - 1] < tasks
    for i in gl.static_range(len(queue)):
        right = right & (experts[i] == guess[i])
    return right


@gluon.jit
def fill(
    stages, stage, queue, experts, tasks, descs, ring, bars, sizes, CASE: gl.constexpr
):  # fmt: skip
    """Load into the ring's ``stage`` what is needed ``stages`` stages after the queue's first task
    begins, if there is such a thing.

    sizes: (local experts, rows of one of them in the views, how far below the rows of the first
    view those of the second lie).
    """
    KSTEPS: gl.constexpr = stages_of(CASE)
    DEPTH: gl.constexpr = CASE.DEPTH
    VALID: gl.constexpr = CASE.VALID
    BOX: gl.constexpr = descs[0].block_shape[0]
    num_local, desc_rows, below = sizes
    later = stages // KSTEPS
    task = queue[0]
    expert = experts[0]
    for i in gl.static_range(1, len(queue)):
        task = gl.where(later == i, queue[i], task)
        expert = gl.where(later == i, experts[i], expert)
    if task < tasks:
        row = known(expert, num_local) * desc_rows + task % tiles_of(CASE) * wide_of(CASE)
        byte = stages % KSTEPS * (DEPTH * STEP)
        bar = bars.index(stage)
        mbarrier.expect(bar, DEPTH * 2 * VALID * STEP)
        for step in gl.static_range(DEPTH):
            part = ring.index(stage * DEPTH + step)
            at = byte + step * STEP
            for first in gl.static_range(0, VALID, BOX):
                low = part.slice(first, BOX, 0)
                high = part.slice(CASE.ROWS // 2 + first, BOX, 0)
                tma_load(descs[0], [row + first, at], bar, low)
                tma_load(descs[1], [row + below + first, at], bar, high)


@gluon.jit
def scales_at(scales, task, CASE: gl.constexpr, LAYOUT: gl.constexpr):
    """Which scale of its expert's each row [ROWS] of a task's tile has; features past the last are
    taken for it."""
    HALF: gl.constexpr = CASE.ROWS // 2
    tile = task % tiles_of(CASE)
    m = gl.arange(0, CASE.ROWS, LAYOUT)
    if CASE.GATED:
        shard = m // HALF
        feature = gl.minimum(tile * CASE.VALID + m % HALF, CASE.N - 1)
    else:
        shard = m * 0
        feature = gl.minimum((2 * tile + m // HALF) * CASE.VALID + m % HALF, CASE.N - 1)
    return shard * scales.shard_step + feature // scales.block * scales.row_step


@gluon.jit
def ask_for_scales(scale_ptr, count):
    """Bring the weights' scales to the L2, all programs their share, at most a line for each
    thread: asked for a task ahead, between weights that stream by, they would wait in the memory's
    queue for as long as a task takes."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    thread = gl.arange(0, 32 * gl.num_warps(), layout)
    at = (gl.program_id(0) + gl.num_programs(0) * thread) * LINE_WORDS
    gl.inline_asm_elementwise(
        """{
            .reg .pred p;
            setp.lt.s32 p, $2, $3;
            @p prefetch.global.L2::evict_last [$1];
            mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [scale_ptr + at, at, count],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def scales_layout(TILE, num_warps):
    """[SPAN, TILE]: a thread has the same row in several steps."""
    across = min(num_warps, TILE // 32)
    return gl.BlockedLayout([1, 1], [1, 32], [num_warps // across, across], [1, 0])


@gluon.jit
def load_scales(scales, task, expert, first, SPAN: gl.constexpr, CASE: gl.constexpr):
    """Scales [SPAN, ROWS] of a tile's rows, for each step from ``first`` on."""
    layout: gl.constexpr = scales_layout(CASE.ROWS, gl.num_warps())
    at = scales_at(scales, task, CASE, gl.SliceLayout(0, layout))
    column = (first + gl.arange(0, SPAN, gl.SliceLayout(1, layout))) * STEP
    group = gl.minimum(column, CASE.D - 1) // CASE.GROUP
    own = scales.pointer + expert.to(gl.int64) * scales.stride_expert
    row = own + gl.expand_dims(at * scales.stride_row, 0)
    return gl.load(row + gl.expand_dims(group, 1))


@gluon.jit
def row_scales(scales, task, expert, CASE: gl.constexpr, LAYOUT: gl.constexpr):
    """Scales [ROWS] of a tile's rows that have one each."""
    at = scales_at(scales, task, CASE, LAYOUT)
    own = scales.pointer + expert.to(gl.int64) * scales.stride_expert
    return gl.load(own + at * scales.stride_row)
