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
    columns_layout,
    find_block,
    issue_rows,
    issue_tiles,
    load_bias,
    next_stage,
    next_step,
    open_barriers,
    rows_layout,
    store_columns,
    tile_of,
)

UNSPECIALIZED = ("R", "num_local")


@gluon.jit
def find_down(
    task,
    blocks,
    act_ptr,
    tables,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILE: gl.constexpr,
    BN: gl.constexpr,
    GROUP: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """(row of the weights, rows of act [BN], which of them live) of a task of down_kernel."""
    TILES: gl.constexpr = (H + TILE - 1) // TILE
    block, tile = tile_of(task, blocks, TILES, GROUP)
    expert, slots = find_block(block, tables, num_local, BN, LAYOUT)
    live = (slots >= 0) & (slots < R)
    x_rows = act_ptr + gl.where(live, slots, 0).to(gl.int64) * I
    return expert * H + tile * TILE, x_rows, live


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    desc,
    bias_ptr,
    act_ptr,
    out_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILE: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    dtype: gl.constexpr = desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    KSTEPS: gl.constexpr = (I + BK - 1) // BK
    TILES: gl.constexpr = (H + TILE - 1) // TILE
    rows: gl.constexpr = gl.SliceLayout(1, rows_layout(BN, BK, WARPS))
    stored: gl.constexpr = columns_layout(WARPS)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BK], desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], x_shared)
    bars = open_barriers(STAGES, 32 * WARPS)

    # The tables were complete before up_kernel let this launch begin.
    blocks = gl.load(num_post_ptr, cache_modifier=".cg") // BN
    tasks = blocks * TILES
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    tables = (expert_ids_ptr, sorted_ptr)

    dead = (0, act_ptr + gl.zeros([BN], gl.int64, rows), gl.zeros([BN], gl.int1, rows))
    ahead = first
    ahead_k = 0
    state = dead
    for stage in range(STAGES):
        if ahead < tasks:
            if ahead_k == 0:
                state = find_down(
                    ahead, blocks, act_ptr, tables, R, num_local, H, I, TILE, BN, GROUP, rows
                )
            issue_tiles((desc,), (ring,), (state[0],), bars, stage, ahead_k * BK)
        ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)

    gdc_wait()
    gdc_launch_dependents()
    ahead = first
    ahead_k = 0
    state = dead
    for stage in range(STAGES):
        if ahead < tasks:
            if ahead_k == 0:
                state = find_down(
                    ahead, blocks, act_ptr, tables, R, num_local, H, I, TILE, BN, GROUP, rows
                )
            issue_rows(state[1], state[2], x_ring, bars, stage, ahead_k * BK, I)
        ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)

    stage = 0
    phase = 0
    for task in range(first, tasks, programs):
        block, tile = tile_of(task, blocks, TILES, GROUP)
        column = tile * TILE
        expert, slots = find_block(block, tables, num_local, BN, gl.SliceLayout(0, stored))
        acc = gl.zeros([TILE, BN], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x_tile = x_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(ring.index(stage), x_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            barrier()
            if ahead < tasks:
                if ahead_k == 0:
                    state = find_down(
                        ahead, blocks, act_ptr, tables, R, num_local, H, I, TILE, BN, GROUP, rows
                    )
                issue_tiles((desc,), (ring,), (state[0],), bars, stage, ahead_k * BK)
                issue_rows(state[1], state[2], x_ring, bars, stage, ahead_k * BK, I)
            ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)
            stage, phase = next_stage(stage, phase, STAGES)

        if bias_ptr is not None:
            at = bias_ptr + expert.to(gl.int64) * H + column
            acc += load_bias(at, 1, H - column, TILE, acc_layout)
        store_columns(out_ptr, acc, slots, R, column, H, stored)
