"""Few rows per expert on Hopper: weights stream once through a ring of shared memory.

Two persistent Gluon launches and a sum. In both GEMMs the weight rows are the M side of the WGMMA
and the slots of one block (BN of them, all of one expert) the N side. The ring of STAGES weight
tiles is filled by TMA and never drains between tiles: step i + STAGES is loaded as soon as step i
is consumed, whichever tile either belongs to. Token rows are gathered by cp.async onto the same
barrier.

up_kernel    grid (programs,): x [T, H], w1 -> act [R, I], row = slot. Two weight tiles per step:
             gate and up (or, without a gate, two neighbouring tiles).
down_kernel  grid (programs,): act [R, I], w2 -> y [R, H], row = slot. It begins wherever a program
             of up_kernel has ended (programmatic dependent launch), and fills its ring before it
             waits for the rest of them: weights depend on nothing.
sum_kernel   grid (T, cdiv(H, BLOCK)): y, weights -> out [T, H], in fp32, in one fixed order.

A task is (block, tile of weight rows); tasks go round robin over the programs. Slots without an
expert belong to no block, and their rows of act and y are neither written nor read.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import (
    columns_layout,
    find_block,
    gate_up_descriptors,
    hopper_activation,
    issue_rows,
    issue_tiles,
    load_bias,
    matrix_descriptor,
    next_stage,
    next_step,
    open_barriers,
    rows_layout,
    store_columns,
)
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.tuning.hopper_tiles import DecodeTiles

UNSPECIALIZED = ("R", "num_mapped", "num_local", "desc_rows")


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
):
    """Load step k of a task of up_kernel, if there is such a task.

    state: (row of the weights, rows of x [BN], which of them live), found anew where k == 0.
    """
    rings, x_ring, bars = buffers
    R, num_local, desc_rows = sizes
    BN: gl.constexpr = x_ring.shape[1]
    BK: gl.constexpr = x_ring.shape[2]
    layout: gl.constexpr = gl.SliceLayout(1, rows_layout(BN, BK, gl.num_warps()))
    row, x_rows, live = state
    if task < tasks:
        if k == 0:
            expert, slots = find_block(task // TILES, tables, num_local, BN, layout)
            live = (slots >= 0) & (slots < R)
            x_rows = x[0] + (gl.where(live, slots, 0) // PICKS).to(gl.int64) * x[1]
            row = expert * desc_rows + task % TILES * WIDE
        issue_tiles(descs, rings, (row, row + BELOW), bars, stage, k * BK)
        issue_rows(x_rows, live, x_ring, bars, stage, k * BK, H)
    return row, x_rows, live


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
    rows: gl.constexpr = gl.SliceLayout(1, rows_layout(BN, BK, WARPS))
    stored: gl.constexpr = columns_layout(TILE, WARPS)
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
    programs = gl.num_programs(0)
    buffers = ((gate_ring, up_ring), x_ring, bars)
    descs = (gate_desc, up_desc)
    x = (x_ptr, stride_x)
    tables = (expert_ids_ptr, sorted_ptr)
    sizes = (R, num_local, desc_rows)

    ahead = first
    ahead_k = 0
    state = (0, x_ptr + gl.zeros([BN], gl.int64, rows), gl.zeros([BN], gl.int1, rows))
    for stage in range(STAGES):
        state = load_up(
            ahead, ahead_k, tasks, state, stage, buffers, descs, x, tables, sizes,
            H, PICKS, TILES, WIDE, BELOW,
        )  # fmt: skip
        ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)

    stage = 0
    phase = 0
    for task in range(first, tasks, programs):
        gate = gl.zeros([TILE, BN], gl.float32, acc_layout)
        up = gl.zeros([TILE, BN], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x_tile = x_ring.index(stage).permute((1, 0))
            gate = warpgroup_mma(gate_ring.index(stage), x_tile, gate, is_async=True)
            up = warpgroup_mma(up_ring.index(stage), x_tile, up, is_async=True)
            gate, up = warpgroup_mma_wait(0, deps=(gate, up))
            gl.thread_barrier()
            state = load_up(
                ahead, ahead_k, tasks, state, stage, buffers, descs, x, tables, sizes,
                H, PICKS, TILES, WIDE, BELOW,
            )  # fmt: skip
            ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)
            stage, phase = next_stage(stage, phase, STAGES)

        column = task % TILES * WIDE
        expert, slots = find_block(task // TILES, tables, num_local, BN, gl.SliceLayout(0, stored))
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


@gluon.jit
def find_down(
    task,
    act_ptr,
    tables,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILE: gl.constexpr,
    BN: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """(row of the weights, rows of act [BN], which of them live) of a task of down_kernel."""
    TILES: gl.constexpr = (H + TILE - 1) // TILE
    expert, slots = find_block(task // TILES, tables, num_local, BN, LAYOUT)
    live = (slots >= 0) & (slots < R)
    x_rows = act_ptr + gl.where(live, slots, 0).to(gl.int64) * I
    return expert * H + task % TILES * TILE, x_rows, live


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
):
    dtype: gl.constexpr = desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    KSTEPS: gl.constexpr = (I + BK - 1) // BK
    TILES: gl.constexpr = (H + TILE - 1) // TILE
    rows: gl.constexpr = gl.SliceLayout(1, rows_layout(BN, BK, WARPS))
    stored: gl.constexpr = columns_layout(TILE, WARPS)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BK], desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], x_shared)
    bars = open_barriers(STAGES, 32 * WARPS)

    # The tables were complete before up_kernel let this launch begin.
    tasks = gl.load(num_post_ptr, cache_modifier=".cg") // BN * TILES
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
                state = find_down(ahead, act_ptr, tables, R, num_local, H, I, TILE, BN, rows)
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
                state = find_down(ahead, act_ptr, tables, R, num_local, H, I, TILE, BN, rows)
            issue_rows(state[1], state[2], x_ring, bars, stage, ahead_k * BK, I)
        ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)

    stage = 0
    phase = 0
    for task in range(first, tasks, programs):
        acc = gl.zeros([TILE, BN], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x_tile = x_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(ring.index(stage), x_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            gl.thread_barrier()
            if ahead < tasks:
                if ahead_k == 0:
                    state = find_down(ahead, act_ptr, tables, R, num_local, H, I, TILE, BN, rows)
                issue_tiles((desc,), (ring,), (state[0],), bars, stage, ahead_k * BK)
                issue_rows(state[1], state[2], x_ring, bars, stage, ahead_k * BK, I)
            ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)
            stage, phase = next_stage(stage, phase, STAGES)

        column = task % TILES * TILE
        expert, slots = find_block(task // TILES, tables, num_local, BN, gl.SliceLayout(0, stored))
        if bias_ptr is not None:
            at = bias_ptr + expert.to(gl.int64) * H + column
            acc += load_bias(at, 1, H - column, TILE, acc_layout)
        store_columns(out_ptr, acc, slots, R, column, H, stored)


@triton.jit
def sum_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    H,
    stride_out,
    num_mapped,
    num_local,
    PICKS: tl.constexpr,
    PADDED_PICKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass: all rows are loaded before it is known which of them live."""
    gdc_wait()
    gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    pick = tl.arange(0, PADDED_PICKS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    slot = token * PICKS + pick
    at = slot[:, None] * H + column[None, :]
    wanted = (pick < PICKS)[:, None] & inside[None, :]
    rows = tl.load(y_ptr + at, wanted, 0.0, cache_modifier=".cg").to(tl.float32)
    expert = tl.load(ids_ptr + slot, pick < PICKS, -1, cache_modifier=".cg")
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + slot, pick < PICKS, 0.0, cache_modifier=".cg")
        rows *= weight.to(tl.float32)[:, None]
    live = local_expert(expert, map_ptr, num_mapped, num_local) >= 0
    total = tl.sum(tl.where(live[:, None], rows, 0.0), 0)
    tl.store(out_ptr + token * stride_out + column, total, inside)


def decode(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    activation: DeviceActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    tables: MoEAlignment,
    tiles: DecodeTiles,
    programs: int,
) -> None:
    """Launch the three kernels; arguments are those of ``kernels.hopper_decode``, checked there."""
    H = w2.shape[1]
    T, K = topk_ids.shape
    decode_gemms(x, w1, w2, K, act, y, activation, w1_bias, w2_bias, tables, tiles, programs)
    warps = 1 if T <= 256 else 4
    sum_kernel[(T, triton.cdiv(H, 256 * warps))](
        y,
        topk_weights,
        topk_ids,
        expert_map,
        out,
        H,
        out.stride(0),
        0 if expert_map is None else expert_map.shape[0],
        w2.shape[0],
        PICKS=K,
        PADDED_PICKS=triton.next_power_of_2(K),
        BLOCK=256 * warps,
        num_warps=warps,
        launch_pdl=True,
    )


def decode_gemms(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    K: int,
    act: torch.Tensor,
    y: torch.Tensor,
    activation: DeviceActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    tables: MoEAlignment,
    tiles: DecodeTiles,
    programs: int,
) -> None:
    """up_kernel and down_kernel alone: the rows of y [R, H] whose slots the tables name."""
    e, H, I = w2.shape  # noqa: E741
    R = y.shape[0]
    sorted_ids, expert_ids, num_post = tables
    gate, up, desc_rows = gate_up_descriptors(w1, I, activation, tiles.up.rows, tiles.up.depth)
    up_kernel[(programs,)](
        gate,
        up,
        w1_bias,
        x,
        act,
        expert_ids,
        sorted_ids,
        num_post,
        x.stride(0),
        R,
        e,
        desc_rows,
        activation.limit,
        activation.alpha,
        activation.beta,
        H=H,
        I=I,
        PICKS=K,
        FORMULA=activation.formula,
        GATED=activation.gated,
        INTERLEAVED=activation.interleaved,
        TILE=tiles.up.rows,
        BN=tiles.block,
        BK=tiles.up.depth,
        STAGES=tiles.up.stages,
        num_warps=tiles.up.warps,
        launch_pdl=True,
    )
    down_kernel[(programs,)](
        matrix_descriptor(w2.view(e * H, I), tiles.down.rows, tiles.down.depth),
        w2_bias,
        act,
        y,
        expert_ids,
        sorted_ids,
        num_post,
        R,
        e,
        H=H,
        I=I,
        TILE=tiles.down.rows,
        BN=tiles.block,
        BK=tiles.down.depth,
        STAGES=tiles.down.stages,
        num_warps=tiles.down.warps,
        launch_pdl=True,
    )
