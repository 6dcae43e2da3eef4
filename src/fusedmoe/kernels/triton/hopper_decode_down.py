"""The second launch of ``hopper_decode``: act [R, I], w2 -> y [R, H], row = slot."""

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
    load_bias,
    next_stage,
    open_barriers,
    rows_layout,
    rows_of,
    slots_of,
    store_columns,
)
from fusedmoe.kernels.triton.hopper_decode_steps import (
    find_task,
    follow_step,
    one_ahead,
    steps_of,
    tiles_of,
    wait_for_tiles,
)

UNSPECIALIZED = ("R", "num_local", "most")


@gluon.jit
def find_down(task, act_ptr, blocks, tables, CASE: gl.constexpr, LAYOUT: gl.constexpr):
    """(rows of act [SLOTS], which of them live, block, column tile, expert) of a task."""
    block, tile, expert, slots = find_task(task, blocks, tables, CASE, LAYOUT)
    x_rows, live = rows_of(act_ptr, slots, tables.R, CASE.D, 1)
    return x_rows, live, block, tile, expert


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    desc,
    bias_ptr,
    act_ptr,
    out_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counters_ptr,
    R,
    num_local,
    most,
    CASE: gl.constexpr,
):
    """most: how many blocks the tables have room for; those that are not there say -1."""
    dtype: gl.constexpr = desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    H: gl.constexpr = CASE.N
    TILE: gl.constexpr = CASE.WIDE
    BN: gl.constexpr = CASE.SLOTS
    BK: gl.constexpr = CASE.DEPTH
    STAGES: gl.constexpr = CASE.STAGES
    KSTEPS: gl.constexpr = steps_of(CASE)
    TILES: gl.constexpr = tiles_of(CASE)
    gl.static_assert(one_ahead(CASE))
    rows: gl.constexpr = gl.SliceLayout(1, rows_layout(BK, WARPS))
    stored: gl.constexpr = columns_layout(WARPS)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BK], desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], x_shared)
    bars = open_barriers(STAGES, 32 * WARPS)

    # The tables were complete before up_kernel let this launch begin. How many tasks they have is
    # asked for at once with the first: a place behind the last says -1.
    padded = gl.load(num_post_ptr, cache_modifier=".cg")
    first = gl.program_id(0)
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)
    task = gl.minimum(first, most * TILES - 1)
    state = find_down(task, act_ptr, most, tables, CASE, rows)
    tasks = padded // BN * TILES
    if first < tasks:
        for stage in range(STAGES):
            row = state[4] * H + state[3] * TILE
            issue_tiles((desc,), ring, (row,), bars, stage, stage * BK)

    gdc_launch_dependents()
    ahead = first
    ahead_k = 0
    drawn = first
    if first < tasks:
        wait_for_tiles(counters_ptr, state[2], R + CASE.UP_TILES)
    for stage in range(STAGES):
        if first < tasks:
            issue_rows(state[0], state[1], x_ring, bars, stage, stage * BK, CASE.D)
        ahead, ahead_k, drawn = follow_step(
            ahead, ahead_k, drawn, counters_ptr + 1, R, KSTEPS, True
        )

    stage = 0
    phase = 0
    task = first
    number = first
    while task < tasks:
        block, tile, expert = state[2], state[3], state[4]
        slots = slots_of(block, sorted_ptr, BN, gl.SliceLayout(0, stored))
        column = tile * TILE
        acc = gl.zeros([TILE, BN], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x_tile = x_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(ring.index(stage), x_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            barrier()
            if ahead_k == 0:
                number = ahead
            if ahead < tasks:
                if ahead_k == 0:
                    state = find_down(ahead, act_ptr, most, tables, CASE, rows)
                row = state[4] * H + state[3] * TILE
                issue_tiles((desc,), ring, (row,), bars, stage, ahead_k * BK)
                if ahead_k == 0:
                    wait_for_tiles(counters_ptr, state[2], R + CASE.UP_TILES)
                issue_rows(state[0], state[1], x_ring, bars, stage, ahead_k * BK, CASE.D)
            ahead, ahead_k, drawn = follow_step(
                ahead, ahead_k, drawn, counters_ptr + 1, R, KSTEPS, True
            )
            stage, phase = next_stage(stage, phase, STAGES)

        if bias_ptr is not None:
            at = bias_ptr + expert.to(gl.int64) * H + column
            acc += load_bias(at, 1, H - column, TILE, acc_layout)
        store_columns(out_ptr, acc, slots, R, column, H, stored)
        task = number
    # Nothing of up_kernel runs any more when this launch has ended.
    gdc_wait()
