"""The first launch of ``hopper_decode``: x [T, H], w1 -> act [R, I], row = slot."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.gluon_names import barrier
from fusedmoe.kernels.triton.hopper_common import (
    columns_layout,
    hopper_activation,
    issue_rows,
    issue_tiles,
    load_bias,
    next_stage,
    open_barriers,
    rows_layout,
    slots_of,
    store_columns,
)
from fusedmoe.kernels.triton.hopper_decode_steps import count_tile, find_task, follow_step

UNSPECIALIZED = ("R", "num_local", "desc_rows")


@gluon.jit
def load_up(
    task,
    k,
    tasks,
    state,
    stage,
    buffers,
    descs,
    x,
    tables,
    sizes,
    H: gl.constexpr,
    PICKS: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """Load step k of a task of up_kernel, if there is such a task.

    state: (rows of x [BN], which of them live, block, column tile, expert, number) of the task,
    found anew where k == 0.
    """
    rings, x_ring, bars = buffers
    R, num_local, desc_rows = sizes
    BN: gl.constexpr = x_ring.shape[1]
    BK: gl.constexpr = x_ring.shape[2]
    layout: gl.constexpr = gl.SliceLayout(1, rows_layout(BN, BK, gl.num_warps()))
    x_rows, live, block, tile, expert, number = state
    if k == 0:
        number = task
    if task < tasks:
        if k == 0:
            block, tile, expert, slots = find_task(
                task, tasks // TILES, tables, num_local, BN, TILES, GROUP, TOGETHER, layout
            )
            live = (slots >= 0) & (slots < R)
            x_rows = x[0] + (gl.where(live, slots, 0) // PICKS).to(gl.int64) * x[1]
        row = expert * desc_rows + tile * WIDE
        issue_tiles(descs, rings, (row, row + BELOW), bars, stage, k * BK)
        issue_rows(x_rows, live, x_ring, bars, stage, k * BK, H)
    return x_rows, live, block, tile, expert, number


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    gate_desc,
    up_desc,
    bias_ptr,
    x_ptr,
    out_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counters_ptr,
    stride_x,
    R,
    num_local,
    desc_rows,
    limit,
    alpha,
    beta,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    TILE: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    DRAWN: gl.constexpr,
):
    """desc_rows: rows of one expert as the descriptors count them (interleaved: gate rows alone).

    Without a gate both descriptors are w1's and the second tile lies TILE rows below the first.
    """
    dtype: gl.constexpr = gate_desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    KSTEPS: gl.constexpr = (H + BK - 1) // BK
    WIDE: gl.constexpr = TILE if GATED else 2 * TILE
    BELOW: gl.constexpr = 0 if GATED else TILE
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    ONE_AHEAD: gl.constexpr = STAGES <= KSTEPS
    rows: gl.constexpr = gl.SliceLayout(1, rows_layout(BN, BK, WARPS))
    stored: gl.constexpr = columns_layout(WARPS)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    gate_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BK], gate_desc.layout)
    up_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BK], up_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], x_shared)
    bars = open_barriers(STAGES, 32 * WARPS)

    gdc_wait()
    gdc_launch_dependents()
    tasks = gl.load(num_post_ptr, cache_modifier=".cg") // BN * TILES
    first = gl.program_id(0)
    buffers = ((gate_ring, up_ring), x_ring, bars)
    descs = (gate_desc, up_desc)
    x = (x_ptr, stride_x)
    tables = (expert_ids_ptr, sorted_ptr)
    sizes = (R, num_local, desc_rows)

    ahead = first
    ahead_k = 0
    drawn = first
    state = (
        x_ptr + gl.zeros([BN], gl.int64, rows),
        gl.zeros([BN], gl.int1, rows),
        first,
        first,
        first,
        first,
    )
    for stage in range(STAGES):
        state = load_up(
            ahead, ahead_k, tasks, state, stage, buffers, descs, x, tables, sizes,
            H, PICKS, TILES, WIDE, BELOW, GROUP, ONE_AHEAD,
        )  # fmt: skip
        ahead, ahead_k, drawn = follow_step(
            ahead, ahead_k, drawn, counters_ptr, R, KSTEPS, DRAWN and ONE_AHEAD
        )

    stage = 0
    phase = 0
    task = first
    while task < tasks:
        if ONE_AHEAD:
            block, tile, expert = state[2], state[3], state[4]
            slots = slots_of(block, sorted_ptr, BN, gl.SliceLayout(0, stored))
        else:
            block, tile, expert, slots = find_task(
                task, tasks // TILES, tables, num_local, BN, TILES, GROUP, ONE_AHEAD,
                gl.SliceLayout(0, stored),
            )  # fmt: skip
        column = tile * WIDE
        gate = gl.zeros([TILE, BN], gl.float32, acc_layout)
        up = gl.zeros([TILE, BN], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x_tile = x_ring.index(stage).permute((1, 0))
            gate = warpgroup_mma(gate_ring.index(stage), x_tile, gate, is_async=True)
            up = warpgroup_mma(up_ring.index(stage), x_tile, up, is_async=True)
            gate, up = warpgroup_mma_wait(0, deps=(gate, up))
            barrier()
            state = load_up(
                ahead, ahead_k, tasks, state, stage, buffers, descs, x, tables, sizes,
                H, PICKS, TILES, WIDE, BELOW, GROUP, ONE_AHEAD,
            )  # fmt: skip
            ahead, ahead_k, drawn = follow_step(
                ahead, ahead_k, drawn, counters_ptr, R, KSTEPS, DRAWN and ONE_AHEAD
            )
            stage, phase = next_stage(stage, phase, STAGES)

        if bias_ptr is not None:
            STEP: gl.constexpr = 2 if INTERLEAVED else 1
            TO_UP: gl.constexpr = (1 if INTERLEAVED else I) if GATED else TILE
            at = bias_ptr + expert.to(gl.int64) * (2 * I if GATED else I) + column * STEP
            gate += load_bias(at, STEP, I - column, TILE, acc_layout)
            up += load_bias(at + TO_UP, STEP, I - column - BELOW, TILE, acc_layout)
        if GATED:
            act = hopper_activation(FORMULA, gate, up, limit, alpha, beta)
            store_columns(out_ptr, act, slots, R, column, I, stored)
        else:
            act = plain_activation(FORMULA, gate)
            store_columns(out_ptr, act, slots, R, column, I, stored)
            act = plain_activation(FORMULA, up)
            store_columns(out_ptr, act, slots, R, column + TILE, I, stored)
        count_tile(counters_ptr, block)
        task = state[5] if ONE_AHEAD else task + gl.num_programs(0)
