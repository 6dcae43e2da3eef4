"""The second launch of ``hopper_decode`` where a task is short: act [R, I], w2 -> y [R, H].

Tasks go round robin and begin when all of up_kernel has ended, so nothing is counted or drawn: a
narrow intermediate makes tasks of a step or two, and three trips to the L2 for each, one after the
other, would take longer than its weights. Tables are read ahead: for all tasks of the first ring at
once, then for the task after the one that is loaded.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import barrier
from fusedmoe.kernels.triton.hopper_common import (
    Tables,
    columns_layout,
    issue_rows,
    issue_tiles,
    known,
    load_bias,
    next_stage,
    next_step,
    open_barriers,
    rows_layout,
    rows_of,
    slots_of,
    store_columns,
)
from fusedmoe.kernels.triton.hopper_decode_steps import steps_of, tiles_of

UNSPECIALIZED = ("R", "num_local", "most")


@gluon.jit
def look_up(task, most, tables, CASE: gl.constexpr, LAYOUT: gl.constexpr):
    """(expert as the table has it, slots [SLOTS]) of a task, or of the last place of the tables."""
    block = gl.minimum(task // tiles_of(CASE), most - 1)
    expert = gl.load(tables.experts + block, cache_modifier=".cg")
    return expert, slots_of(block, tables.slots, CASE.SLOTS, LAYOUT)


@gluon.jit
def issue_act(act_ptr, slots, R, x_ring, bars, stage, k, I: gl.constexpr):  # noqa: E741
    rows, live = rows_of(act_ptr, slots, R, I, 1)
    issue_rows(rows, live, x_ring, bars, stage, k, I)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def dealt_kernel(
    desc,
    bias_ptr,
    act_ptr,
    out_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    R,
    num_local,
    most,
    CASE: gl.constexpr,
):
    """most: how many blocks the tables have room for; those that are not there say -1."""
    dtype: gl.constexpr = desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    H: gl.constexpr = CASE.N
    I: gl.constexpr = CASE.D  # noqa: E741
    TILE: gl.constexpr = CASE.WIDE
    BN: gl.constexpr = CASE.SLOTS
    BK: gl.constexpr = CASE.DEPTH
    STAGES: gl.constexpr = CASE.STAGES
    KSTEPS: gl.constexpr = steps_of(CASE)
    TILES: gl.constexpr = tiles_of(CASE)
    AT_ONCE: gl.constexpr = (STAGES + KSTEPS - 1) // KSTEPS
    rows: gl.constexpr = gl.SliceLayout(1, rows_layout(BK, WARPS))
    stored: gl.constexpr = columns_layout(WARPS)
    columns: gl.constexpr = gl.SliceLayout(0, stored)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BK], desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], x_shared)
    bars = open_barriers(STAGES, 32 * WARPS)

    # The tables were complete before up_kernel let this launch begin.
    padded = gl.load(num_post_ptr, cache_modifier=".cg")
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)

    found = (look_up(first, most, tables, CASE, rows),)
    for i in gl.static_range(1, AT_ONCE):
        one = look_up(first + i * programs, most, tables, CASE, rows)
        found += (one,)  # type: ignore[assignment]
    own = look_up(first, most, tables, CASE, columns)
    tasks = padded // BN * TILES
    for stage in gl.static_range(STAGES):
        ahead = first + stage // KSTEPS * programs
        if ahead < tasks:
            row = known(found[stage // KSTEPS][0], num_local) * H + ahead % TILES * TILE
            issue_tiles((desc,), ring, (row,), bars, stage, stage % KSTEPS * BK)
    gdc_launch_dependents()
    gdc_wait()
    for stage in gl.static_range(STAGES):
        ahead = first + stage // KSTEPS * programs
        if ahead < tasks:
            issue_act(
                act_ptr, found[stage // KSTEPS][1], R, x_ring, bars, stage, stage % KSTEPS * BK, I
            )

    ahead = first + STAGES // KSTEPS * programs
    ahead_k = STAGES % KSTEPS
    coming = look_up(first + AT_ONCE * programs, most, tables, CASE, rows)
    state = found[AT_ONCE - 1]
    stage = 0
    phase = 0
    task = first
    while task < tasks:
        expert, slots = own
        own = look_up(task + programs, most, tables, CASE, columns)
        column = task % TILES * TILE
        acc = gl.zeros([TILE, BN], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x_tile = x_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(ring.index(stage), x_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            barrier()
            if ahead < tasks:
                if ahead_k == 0:
                    state = coming
                    coming = look_up(ahead + programs, most, tables, CASE, rows)
                row = known(state[0], num_local) * H + ahead % TILES * TILE
                issue_tiles((desc,), ring, (row,), bars, stage, ahead_k * BK)
                issue_act(act_ptr, state[1], R, x_ring, bars, stage, ahead_k * BK, I)
            ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)
            stage, phase = next_stage(stage, phase, STAGES)

        if bias_ptr is not None:
            at = bias_ptr + known(expert, num_local).to(gl.int64) * H + column
            acc += load_bias(at, 1, H - column, TILE, acc_layout)
        store_columns(out_ptr, acc, slots, R, column, H, stored)
        task += programs
