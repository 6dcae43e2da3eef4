"""What both kernels of ``hopper_prefill`` do: the order of tiles, products, stores, the rings."""

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

BLOCK_M = gl.constexpr(128)
HALF_M = gl.constexpr(64)
TILE_N = gl.constexpr(128)
HANDING_ON = gl.constexpr(4)  # what it costs to leave and to resume products, in steps
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
PART_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
HALF_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@gluon.jit
def tile_of(task, blocks, TILES: gl.constexpr, GROUP: gl.constexpr):
    """(block, column tile): groups of GROUP blocks, column tiles outer, blocks inner."""
    first = task // (GROUP * TILES) * GROUP
    size = gl.minimum(blocks - first, GROUP)
    rest = task - first * TILES
    return first + rest % size, rest // size


@gluon.jit
def plan_of(tasks, KSTEPS: gl.constexpr, PARTS: gl.constexpr):
    """What this program does: whole rounds of tasks, and its share of the tasks that are left over.

    Those are cut, each into at most PARTS pieces, so that the programs that have any have equally
    many consecutive steps: from the end of one task into the next. The beginning of a task is done
    first of all, its end last, other pieces in between, so that the products so far (``carry_of``)
    are there when the next piece wants them. Pieces of a task follow each other in the order of the
    programs. Where that saves too few steps, what is left over goes one task to a program.
    """
    me, programs = gl.program_id(0), gl.num_programs(0)
    rounds = tasks // programs
    left = tasks - rounds * programs
    helpers = left
    if PARTS > 1:
        more = gl.minimum(programs, left * PARTS)
        saved = (more - left) * KSTEPS > more * HANDING_ON
        helpers = gl.where((rounds > 0) & saved, more, left)
    steps = left * KSTEPS
    some = me < helpers
    helpers = gl.maximum(helpers, 1)
    begin = me * steps // helpers
    end = gl.maximum((me + 1) * steps // helpers, 1)
    task, last = begin // KSTEPS, (end - 1) // KSTEPS
    begin -= task * KSTEPS
    head_alone = (task == last) & (begin == 0) & (end < (task + 1) * KSTEPS)
    early = some & (head_alone | (task != last))
    late = some & ~head_alone
    # Which of how many pieces of its task the late one is.
    first = ((task * KSTEPS + 1) * helpers - 1) // gl.maximum(steps, 1)
    final = ((task + 1) * KSTEPS * helpers - 1) // gl.maximum(steps, 1)
    late_round = gl.where(
        final > first, rounds * (me - first) // gl.maximum(final - first, 1), rounds
    )
    done = rounds * programs
    early_piece = (done + last, end - last * KSTEPS)
    late_piece = (done + task, begin, gl.minimum(end - task * KSTEPS, KSTEPS), late_round)
    count = rounds + gl.where(early, 1, 0) + gl.where(late, 1, 0)
    return count, early, late, early_piece, late_piece


@gluon.jit
def piece_of(index, plan, KSTEPS: gl.constexpr):
    """(task, first step, end of its steps) of the index-th thing that a program does."""
    _, early, late, early_piece, late_piece = plan
    at = index - gl.where(early, 1, 0)
    is_early = at < 0
    is_late = late & (at == late_piece[3])
    whole = at - gl.where(late & (at > late_piece[3]), 1, 0)
    task = gl.program_id(0) + whole * gl.num_programs(0)
    task = gl.where(is_late, late_piece[0], gl.where(is_early, early_piece[0], task))
    begin = gl.where(is_late, late_piece[1], 0)
    end = gl.where(is_late, late_piece[2], gl.where(is_early, early_piece[1], KSTEPS))
    return task, begin, end


@gluon.jit
def carry_of(carry_ptr, owner, WHICH: gl.constexpr):
    """Where ``owner`` leaves one warpgroup's products [HALF_M, 2 * TILE_N]: any order will do, in
    this one the lanes of a warp write side by side."""
    row = gl.arange(0, HALF_M, gl.SliceLayout(1, ACC))
    column = gl.arange(0, 2 * TILE_N, gl.SliceLayout(0, ACC))
    row = row % 16 // 8 * 256 + row // 16 * 64 + row % 8 * 8
    column = column // 8 * 512 + column % 8
    at = carry_ptr + (owner * 2 + WHICH) * (HALF_M * 2 * TILE_N)
    return at + (gl.expand_dims(row, 1) + gl.expand_dims(column, 0))


@gluon.jit
def leave(carried, acc, WHICH: gl.constexpr):
    """Leave the products so far to the next program."""
    carry_ptr, flags_ptr = carried
    me = gl.program_id(0)
    gl.store(carry_of(carry_ptr, me, WHICH), acc, cache_modifier=".cg")
    gl.thread_barrier()
    flag = (flags_ptr + (me * 2 + WHICH)).to(gl.int64)
    gl.inline_asm_elementwise(
        "st.release.gpu.global.s32 [$1], -1; mov.u32 $0, 0;",
        "=r,l",
        [flag],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def resume(carried, lowered, wanted, WHICH: gl.constexpr):
    """The products that the program before has left, as soon as its flag is not ``lowered``; zeros
    if none are ``wanted``. A branch instead of masks would keep ptxas from running the products
    side by side."""
    carry_ptr, flags_ptr = carried
    owner = gl.maximum(gl.program_id(0) - 1, 0)
    zero = gl.inline_asm_elementwise(
        """{
            .reg .pred waits;
            .reg .s32 seen;
            setp.ne.s32 waits, $3, 0;
        again:
            @waits ld.acquire.gpu.global.s32 seen, [$1];
            setp.eq.and.s32 waits, seen, $2, waits;
            @waits bra again;
            mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [(flags_ptr + (owner * 2 + WHICH)).to(gl.int64), lowered, gl.where(wanted, 1, 0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    there = gl.full([HALF_M, 2 * TILE_N], wanted, gl.int1, ACC)
    return gl.load(carry_of(carry_ptr, owner + zero, WHICH), there, 0.0, cache_modifier=".cg")


@gluon.jit
def multiply(
    rings, bars, stage, phase, live, steps, resumes, carried, lowered,
    WHICH: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Products of so many steps of one tile, [HALF_M, 2 * TILE_N]: rows of this warpgroup times
    both weight tiles, added to what the program before has left if ``resumes``.

    Each step is freed when the next one has been issued.
    """
    a_ring, b_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = a_ring.shape[0]
    acc = gl.zeros([HALF_M, 2 * TILE_N], gl.float32, ACC)
    if live:
        if PARTS > 1:
            acc = resume(carried, lowered, resumes, WHICH)
        for k in range(steps):
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
        for _ in range(steps):
            mbarrier.wait(full.index(stage), phase)
            mbarrier.arrive(empty.index(stage), count=1)
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
def store_tile(desc, buffers, value, row, column):
    """TMA store of [HALF_M, TILE_N] in two parts, by way of this warpgroup's two buffers in turn:
    the part before the last has left its buffer when a part is written."""
    PART: gl.constexpr = buffers.shape[2]
    parts = gl.permute(gl.reshape(value.to(buffers.dtype), [HALF_M, 2, PART]), [0, 2, 1])
    left, right = gl.split(parts)
    store_part(desc, buffers.index(0), gl.convert_layout(left, PART_ACC), row, column)
    store_part(desc, buffers.index(1), gl.convert_layout(right, PART_ACC), row, column + PART)


@gluon.jit
def store_part(desc, buffer, value, row, column):
    tma.store_wait(1)
    gl.thread_barrier()
    buffer.store(value)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, [row, column], buffer)


@gluon.jit
def half_is_live(
    task, blocks, sorted_ptr, R, TILES: gl.constexpr, GROUP: gl.constexpr, WHICH: gl.constexpr
):
    """Whether this half of a task's block holds a slot: places fill from the front."""
    live = False
    if task < blocks * TILES:
        block, _ = tile_of(task, blocks, TILES, GROUP)
        slot = gl.load(sorted_ptr + block * BLOCK_M + WHICH * HALF_M)
        live = (slot >= 0) & (slot < R)
    return live


@gluon.jit
def load_bias(bias_ptr, step, limit):
    """bias[step * n] as fp32 [1, TILE_N], 0 from n = limit on."""
    n = gl.arange(0, TILE_N, gl.SliceLayout(0, HALF_ACC))
    bias = gl.load(bias_ptr + step * n, mask=n < limit, other=0.0)
    return gl.expand_dims(bias.to(gl.float32), 0)


@gluon.jit
def open_rings(desc, BK: gl.constexpr, STAGES: gl.constexpr, FILLERS: gl.constexpr):
    """(rings, barriers, the output buffers of both warpgroups); FILLERS threads gather beside the
    TMA arrival."""
    dtype: gl.constexpr = desc.dtype
    a_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BK], dtype)
    PART: gl.constexpr = TILE_N // 2
    out_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF_M, PART], dtype)
    rings = (
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BK], a_shared),
        gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE_N, BK], desc.layout),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    out0 = gl.allocate_shared_memory(dtype, [2, HALF_M, PART], out_shared)
    out1 = gl.allocate_shared_memory(dtype, [2, HALF_M, PART], out_shared)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + FILLERS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    return rings, (full, empty), out0, out1
