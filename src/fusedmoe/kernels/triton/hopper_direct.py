"""One or two tokens on Hopper: as ``hopper_decode``, but without tables and without a sum.

Two persistent Gluon launches that stream weights through a ring filled by TMA alone.

up_kernel    grid (programs,): x [T, H], w1 -> act [R, I], row = slot. A task is (slot, TILE
             columns): TILE rows of gate above TILE rows of up are the M side of the WGMMA, the
             first TOKENS rows of x the N side, of which the slot's own token counts.
down_kernel  grid (programs,): act, w2, weights -> out [T, H]. A task is (token, ROWS columns): the
             ROWS weight rows of each of the token's picks are stacked to one M side, its rows of
             act are the N side, and only pick by same pick counts. The picks are then weighted
             and added in registers, in one fixed order.

All ids are held in registers: R <= SLOTS, a power of two. Slots without an expert are skipped. The
second launch fills its ring before it waits for the first.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import (
    gate_up_descriptors,
    hopper_activation,
    load_bias,
    matrix_descriptor,
    next_stage,
    next_step,
    open_barriers,
    store_columns,
)
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.tuning.hopper_tiles import DirectTiles

UNSPECIALIZED = ("R", "num_mapped", "num_local", "desc_rows")


@gluon.constexpr_function
def everywhere(SLOTS, num_warps):
    """[SLOTS] with a whole copy in every thread, so that picking one value needs no exchange."""
    return gl.BlockedLayout([SLOTS], [32], [num_warps], [0])


@gluon.jit
def load_experts(ids_ptr, map_ptr, R, num_mapped, num_local, SLOTS: gl.constexpr):
    slot = gl.arange(0, SLOTS, everywhere(SLOTS, gl.num_warps()))
    ids = gl.load(ids_ptr + slot, mask=slot < R, other=-1, cache_modifier=".cg")
    return local_expert(ids, map_ptr, num_mapped, num_local)


@gluon.jit
def pick_out(values, index):
    """values[index] of a tensor that every thread holds."""
    at = gl.arange(0, values.shape[0], values.type.layout)
    return gl.sum(gl.where(at == index, values, 0), 0)


@gluon.jit
def live_task(task, tasks, experts, programs, TILES: gl.constexpr):
    """The first task from ``task`` on whose slot has an expert, or one past the last."""
    while (task < tasks) & (pick_out(experts, task // TILES) < 0):
        task += programs
    return task


@gluon.jit
def load_up(
    task, k, row, tasks, stage, descs, rings, bars,
    BELOW: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Load step k of a task of up_kernel, if there is such a task."""
    low_desc, high_desc, x_desc = descs
    ring, x_ring = rings
    TILE: gl.constexpr = ring.shape[1] // 2
    TOKENS: gl.constexpr = x_ring.shape[1]
    if task < tasks:
        bar = bars.index(stage)
        low = ring.index(stage).slice(0, TILE, 0)
        high = ring.index(stage).slice(TILE, TILE, 0)
        mbarrier.expect(bar, (2 * TILE + TOKENS) * BK * 2)
        tma.async_copy_global_to_shared(low_desc, [row, k * BK], bar, low)
        tma.async_copy_global_to_shared(high_desc, [row + BELOW, k * BK], bar, high)
        tma.async_copy_global_to_shared(x_desc, [0, k * BK], bar, x_ring.index(stage))


@gluon.jit
def upper_and_lower(acc):
    """The two halves of the rows of acc."""
    TILE: gl.constexpr = acc.shape[0] // 2
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, N, 2], [32, 1, 1], [gl.num_warps(), 1, 1], [2, 1, 0]
    )
    pairs = gl.permute(gl.reshape(acc, [2, TILE, N]), [1, 2, 0])
    return gl.split(gl.convert_layout(pairs, layout))


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    x_desc,
    bias_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    R,
    num_mapped,
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
    SLOTS: gl.constexpr,
    TILE: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    SHARED: gl.constexpr,
):
    """Descriptors of w1 as in ``hopper_decode.up_kernel``.

    SHARED: a multiprocessor holds a program of either launch, so the second one begins late, or its
    loads would hold up the first's; otherwise as soon as a program of the first has ended.
    """
    dtype: gl.constexpr = low_desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    TOKENS: gl.constexpr = x_desc.block_shape[0]
    KSTEPS: gl.constexpr = (H + BK - 1) // BK
    WIDE: gl.constexpr = TILE if GATED else 2 * TILE
    BELOW: gl.constexpr = 0 if GATED else TILE
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    ring = gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE, BK], low_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, BK], x_desc.layout)
    bars = open_barriers(STAGES, 0)
    descs = (low_desc, high_desc, x_desc)
    rings = (ring, x_ring)
    tasks = R * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    if not SHARED:
        gdc_launch_dependents()
    experts = load_experts(ids_ptr, map_ptr, R, num_mapped, num_local, SLOTS)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    ahead = task + 0
    ahead_k = 0
    row = pick_out(experts, ahead // TILES) * desc_rows + ahead % TILES * WIDE
    for stage in range(STAGES):
        load_up(ahead, ahead_k, row, tasks, stage, descs, rings, bars, BELOW, BK)
        ahead_k += 1
        if ahead_k == KSTEPS:
            ahead_k = 0
            ahead = live_task(ahead + programs, tasks, experts, programs, TILES)
            row = pick_out(experts, ahead // TILES) * desc_rows + ahead % TILES * WIDE
    if SHARED and ahead >= tasks:
        gdc_launch_dependents()

    stage = 0
    phase = 0
    while task < tasks:
        acc = gl.zeros([2 * TILE, TOKENS], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x = x_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(ring.index(stage), x, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            gl.thread_barrier()
            load_up(ahead, ahead_k, row, tasks, stage, descs, rings, bars, BELOW, BK)
            ahead_k += 1
            if ahead_k == KSTEPS:
                ahead_k = 0
                ahead = live_task(ahead + programs, tasks, experts, programs, TILES)
                row = pick_out(experts, ahead // TILES) * desc_rows + ahead % TILES * WIDE
                if SHARED and ahead >= tasks:
                    gdc_launch_dependents()
            stage, phase = next_stage(stage, phase, STAGES)

        gate, up = upper_and_lower(acc)
        layout: gl.constexpr = gate.type.layout
        slot = task // TILES
        column = task % TILES * WIDE
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
        slots = gl.where(token == slot // PICKS, slot, -1)
        if bias_ptr is not None:
            STEP: gl.constexpr = 2 if INTERLEAVED else 1
            TO_UP: gl.constexpr = (1 if INTERLEAVED else I) if GATED else TILE
            expert = pick_out(experts, slot).to(gl.int64)
            at = bias_ptr + expert * (2 * I if GATED else I) + column * STEP
            gate += load_bias(at, STEP, I - column, TILE, layout)
            up += load_bias(at + TO_UP, STEP, I - column - BELOW, TILE, layout)
        if GATED:
            act = hopper_activation(FORMULA, gate, up, limit, alpha, beta)
            store_columns(out_ptr, act, slots, R, column, I, layout)
        else:
            store_columns(out_ptr, plain_activation(FORMULA, gate), slots, R, column, I, layout)
            act = plain_activation(FORMULA, up)
            store_columns(out_ptr, act, slots, R, column + TILE, I, layout)
        task = live_task(task + programs, tasks, experts, programs, TILES)


@gluon.jit
def load_down(
    task, k, tasks, experts, desc, ring, bars, stage,
    H: gl.constexpr, PICKS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Load the weight rows of all picks at step k; every pick arrives once, with or without."""
    TILES: gl.constexpr = (H + ROWS - 1) // ROWS
    BK: gl.constexpr = ring.shape[2]
    if task < tasks:
        bar = bars.index(stage)
        for pick in gl.static_range(PICKS):
            expert = pick_out(experts, task // TILES * PICKS + pick)
            row = expert * H + task % TILES * ROWS
            mbarrier.expect(bar, ROWS * BK * 2, pred=expert >= 0)
            mbarrier.arrive(bar, count=1, pred=expert < 0)
            part = ring.index(stage).slice(pick * ROWS, ROWS, 0)
            tma.async_copy_global_to_shared(desc, [row, k * BK], bar, part, pred=expert >= 0)


@gluon.jit
def load_act(
    task, k, tasks, act_desc, x_ring, bars, stage,
    PICKS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    BK: gl.constexpr = x_ring.shape[2]
    if task < tasks:
        bar = bars.index(stage)
        mbarrier.expect(bar, x_ring.shape[1] * BK * 2)
        row = task // TILES * PICKS
        tma.async_copy_global_to_shared(act_desc, [row, k * BK], bar, x_ring.index(stage))


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    desc,
    act_desc,
    bias_ptr,
    weights_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    stride_out,
    R,
    num_mapped,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    PADDED_PICKS: gl.constexpr,
    SLOTS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = desc.block_shape[0]
    TILE: gl.constexpr = ROWS * PADDED_PICKS
    N: gl.constexpr = act_desc.block_shape[0]
    KSTEPS: gl.constexpr = (I + BK - 1) // BK
    TILES: gl.constexpr = (H + ROWS - 1) // ROWS
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
    ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, BK], desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, N, BK], act_desc.layout)
    bars = open_barriers(STAGES, PICKS)
    tasks = R // PICKS * TILES
    first = gl.program_id(0)
    programs = gl.num_programs(0)

    # The ids were complete before up_kernel let this launch begin.
    experts = load_experts(ids_ptr, map_ptr, R, num_mapped, num_local, SLOTS)
    ahead = first + 0
    ahead_k = 0
    for stage in range(STAGES):
        load_down(ahead, ahead_k, tasks, experts, desc, ring, bars, stage, H, PICKS, ROWS)
        ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)
    gdc_wait()
    gdc_launch_dependents()
    ahead = first + 0
    ahead_k = 0
    for stage in range(STAGES):
        load_act(ahead, ahead_k, tasks, act_desc, x_ring, bars, stage, PICKS, TILES)
        ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)

    m = gl.arange(0, TILE, by_row)
    n = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, acc_layout)), 0)
    pick = m // ROWS
    stage = 0
    phase = 0
    for task in range(first, tasks, programs):
        token = task // TILES
        slot = token * PICKS + pick
        ids = gl.load(ids_ptr + slot, mask=pick < PICKS, other=-1, cache_modifier=".cg")
        expert = local_expert(ids, map_ptr, num_mapped, num_local)
        live = expert >= 0
        column = task % TILES * ROWS
        inside = column + m % ROWS < H
        if weights_ptr is not None:
            weight = gl.load(weights_ptr + slot, mask=live, other=0.0, cache_modifier=".cg")
            weight = weight.to(gl.float32)
        acc = gl.zeros([TILE, N], gl.float32, acc_layout)
        for _ in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            x = x_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(ring.index(stage), x, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            gl.thread_barrier()
            load_down(ahead, ahead_k, tasks, experts, desc, ring, bars, stage, H, PICKS, ROWS)
            load_act(ahead, ahead_k, tasks, act_desc, x_ring, bars, stage, PICKS, TILES)
            ahead, ahead_k = next_step(ahead, ahead_k, programs, KSTEPS)
            stage, phase = next_stage(stage, phase, STAGES)

        own = gl.expand_dims(pick, 1) == n
        value = gl.sum(gl.where(own, acc, 0.0), 1)
        if bias_ptr is not None:
            at = expert.to(gl.int64) * H + column + m % ROWS
            value += gl.load(bias_ptr + at, mask=live & inside, other=0.0).to(gl.float32)
        if weights_ptr is not None:
            value *= weight
        value = gl.where(live, value, 0.0)
        total = gl.sum(gl.reshape(value, [PADDED_PICKS, ROWS]), 0)
        at = column + gl.arange(0, ROWS, total.type.layout)
        out = out_ptr + token.to(gl.int64) * stride_out
        gl.store(out + at, total.to(out_ptr.dtype.element_ty), at < H)


def direct(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    activation: DeviceActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    tiles: DirectTiles,
    programs: int,
) -> None:
    """Launch both kernels; arguments are those of ``kernels.hopper_direct``, checked there."""
    e, H, I = w2.shape  # noqa: E741
    T, K = topk_ids.shape
    R = T * K
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    slots = max(2, 1 << (R - 1).bit_length())
    picks = 1 << (K - 1).bit_length()
    gate, up, desc_rows = gate_up_descriptors(w1, I, activation, tiles.up_rows, tiles.depth)
    up_kernel[(programs,)](
        gate,
        up,
        matrix_descriptor(x, 8, tiles.depth),
        w1_bias,
        act,
        topk_ids,
        expert_map,
        R,
        num_mapped,
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
        SLOTS=slots,
        TILE=tiles.up_rows,
        BK=tiles.depth,
        STAGES=tiles.up_stages,
        SHARED=tiles.shared,
        num_warps=4,
        launch_pdl=True,
    )
    down_kernel[(programs,)](
        matrix_descriptor(w2.view(e * H, I), tiles.down_rows // picks, tiles.depth),
        matrix_descriptor(act, max(8, picks), tiles.depth),
        w2_bias,
        topk_weights,
        out,
        topk_ids,
        expert_map,
        out.stride(0),
        R,
        num_mapped,
        e,
        H=H,
        I=I,
        PICKS=K,
        PADDED_PICKS=picks,
        SLOTS=slots,
        BK=tiles.depth,
        STAGES=tiles.down_stages,
        num_warps=4,
        launch_pdl=True,
    )
