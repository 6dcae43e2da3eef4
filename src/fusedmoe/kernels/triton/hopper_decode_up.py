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
    Tables,
    columns_layout,
    hopper_activation,
    issue_rows,
    issue_tiles,
    load_bias,
    next_stage,
    open_barriers,
    rows_layout,
    rows_of,
    slots_of,
    store_columns,
    upper_and_lower,
)
from fusedmoe.kernels.triton.hopper_decode_steps import (
    count_tile,
    find_task,
    follow_step,
    one_ahead,
    steps_of,
    tiles_of,
)

UNSPECIALIZED = ("R", "num_local", "most", "desc_rows")


@gluon.jit
def find_up(task, blocks, x, tables, CASE: gl.constexpr):
    """(rows of x [SLOTS], which of them live, block, column tile, expert) of a task; x: a pointer,
    and how far rows lie apart."""
    layout: gl.constexpr = gl.SliceLayout(1, rows_layout(CASE.DEPTH, gl.num_warps()))
    block, tile, expert, slots = find_task(task, blocks, tables, CASE, layout)
    x_rows, live = rows_of(x[0], slots, tables.R, x[1], CASE.PICKS)
    return x_rows, live, block, tile, expert


@gluon.jit
def load_up(
    task, k, tasks, blocks, state, stage, buffers, descs, x, tables, desc_rows,
    FOUND: gl.constexpr, CASE: gl.constexpr,
):  # fmt: skip
    """Load step k of a task of up_kernel, if there is such a task.

    state: what ``find_up`` says of it and its number, found anew where k == 0 unless FOUND.
    """
    BELOW: gl.constexpr = 0 if CASE.GATED else CASE.WIDE // 2
    ring, x_ring, bars = buffers
    x_rows, live, block, tile, expert, number = state
    if k == 0:
        number = task
    if task < tasks:
        if not FOUND:  # noqa: SIM102 (Triton does not short-circuit)
            if k == 0:
                x_rows, live, block, tile, expert = find_up(task, blocks, x, tables, CASE)
        row = expert * desc_rows + tile * CASE.WIDE
        issue_tiles(descs, ring, (row, row + BELOW), bars, stage, k * CASE.DEPTH)
        issue_rows(x_rows, live, x_ring, bars, stage, k * CASE.DEPTH, CASE.D)
    return x_rows, live, block, tile, expert, number


@gluon.jit
def store_up(
    out_ptr, bias_ptr, gate, up, slots, R, column, expert, numbers, CASE: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Biases, activation and store of a task; numbers: (limit, alpha, beta)."""
    I: gl.constexpr = CASE.N  # noqa: E741
    GATED: gl.constexpr = CASE.GATED
    FORMULA: gl.constexpr = CASE.FORMULA
    TILE: gl.constexpr = gate.shape[0]
    if bias_ptr is not None:
        layout: gl.constexpr = gate.type.layout
        STEP: gl.constexpr = 2 if CASE.INTERLEAVED else 1
        BELOW: gl.constexpr = 0 if GATED else TILE
        TO_UP: gl.constexpr = (1 if CASE.INTERLEAVED else I) if GATED else TILE
        at = bias_ptr + expert.to(gl.int64) * (2 * I if GATED else I) + column * STEP
        gate += load_bias(at, STEP, I - column, TILE, layout)
        up += load_bias(at + TO_UP, STEP, I - column - BELOW, TILE, layout)
    if GATED:
        act = hopper_activation(FORMULA, gate, up, numbers[0], numbers[1], numbers[2])
        store_columns(out_ptr, act, slots, R, column, I, LAYOUT)
    else:
        act = plain_activation(FORMULA, gate)
        store_columns(out_ptr, act, slots, R, column, I, LAYOUT)
        act = plain_activation(FORMULA, up)
        store_columns(out_ptr, act, slots, R, column + TILE, I, LAYOUT)


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
    most,
    desc_rows,
    limit,
    alpha,
    beta,
    CASE: gl.constexpr,
):
    """desc_rows: rows of one expert as the descriptors count them (interleaved: gate rows alone).
    most: how many blocks the tables have room for; those that are not there say -1.

    Without a gate both descriptors are w1's and the second tile lies below the first.
    """
    dtype: gl.constexpr = gate_desc.dtype
    TILE: gl.constexpr = gate_desc.block_shape[0]
    WARPS: gl.constexpr = gl.num_warps()
    BN: gl.constexpr = CASE.SLOTS
    BK: gl.constexpr = CASE.DEPTH
    STAGES: gl.constexpr = CASE.STAGES
    KSTEPS: gl.constexpr = steps_of(CASE)
    TILES: gl.constexpr = tiles_of(CASE)
    STACKED: gl.constexpr = TILE < 64
    FIRST: gl.constexpr = 2 * TILE if STACKED else TILE
    ONE_AHEAD: gl.constexpr = one_ahead(CASE)
    rows: gl.constexpr = gl.SliceLayout(1, rows_layout(BK, WARPS))
    stored: gl.constexpr = columns_layout(WARPS)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    ring = gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE, BK], gate_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], x_shared)
    bars = open_barriers(STAGES, 32 * WARPS)

    gdc_wait()
    gdc_launch_dependents()
    padded = gl.load(num_post_ptr, cache_modifier=".cg")
    first = gl.program_id(0)
    buffers = (ring, x_ring, bars)
    descs = (gate_desc, up_desc)
    x = (x_ptr, stride_x)
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)

    if ONE_AHEAD:
        # Asked for at once with how many tasks there are: a place behind the last says -1.
        task = gl.minimum(first, most * TILES - 1)
        found = find_up(task, most, x, tables, CASE)
    else:
        no_rows = x_ptr + gl.zeros([BN], gl.int64, rows)
        found = (no_rows, gl.zeros([BN], gl.int1, rows), first, first, first)
    tasks = padded // BN * TILES
    blocks = most if ONE_AHEAD else padded // BN
    state = (found[0], found[1], found[2], found[3], found[4], first)
    ahead = first
    ahead_k = 0
    drawn = first
    for stage in range(STAGES):
        state = load_up(
            ahead, ahead_k, tasks, blocks, state, stage, buffers, descs, x, tables, desc_rows,
            ONE_AHEAD, CASE,
        )  # fmt: skip
        ahead, ahead_k, drawn = follow_step(
            ahead, ahead_k, drawn, counters_ptr, R, KSTEPS, CASE.DRAWN and ONE_AHEAD
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
                task, blocks, tables, CASE, gl.SliceLayout(0, stored)
            )
        column = tile * CASE.WIDE
        gate = gl.zeros([FIRST, BN], gl.float32, acc_layout)
        up = gl.zeros([TILE, BN], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x_tile = x_ring.index(stage).permute((1, 0))
            if STACKED:
                gate = warpgroup_mma(ring.index(stage), x_tile, gate, is_async=True)
                gate = warpgroup_mma_wait(0, deps=(gate,))
            else:
                both = ring.index(stage)
                gate = warpgroup_mma(both.slice(0, TILE, 0), x_tile, gate, is_async=True)
                up = warpgroup_mma(both.slice(TILE, TILE, 0), x_tile, up, is_async=True)
                gate, up = warpgroup_mma_wait(0, deps=(gate, up))
            barrier()
            state = load_up(
                ahead, ahead_k, tasks, blocks, state, stage, buffers, descs, x, tables, desc_rows,
                False, CASE,
            )  # fmt: skip
            ahead, ahead_k, drawn = follow_step(
                ahead, ahead_k, drawn, counters_ptr, R, KSTEPS, CASE.DRAWN and ONE_AHEAD
            )
            stage, phase = next_stage(stage, phase, STAGES)

        if STACKED:
            gate, up = upper_and_lower(gate)
        store_up(
            out_ptr, bias_ptr, gate, up, slots, R, column, expert, (limit, alpha, beta), CASE,
            stored,
        )  # fmt: skip
        if CASE.COUNTED:
            count_tile(counters_ptr, block)
        task = state[5] if ONE_AHEAD else task + gl.num_programs(0)
