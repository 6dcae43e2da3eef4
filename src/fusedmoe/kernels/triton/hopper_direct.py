"""One or two tokens on Hopper: as ``hopper_decode``, but without tables and without a sum.

Two persistent Gluon launches. One warp fills a ring with TMA, four warps multiply. A ring takes all
of a multiprocessor's shared memory: a program of the second launch begins where one of the first
has ended, and fills its ring with weights before it waits for the others.

up_kernel    grid (programs,): x [T, H], w1 -> act [R, I], row = slot. A task is (slot, VALID
             columns): TILE rows of gate above TILE rows of up, VALID of each loaded, are the M side
             of the WGMMA; the rows of x are the N side, of which the slot's own token counts.
down_kernel  grid (programs,): act, w2, weights -> out [T, H]. A task is (token, VALID columns): the
             weight rows of each of the token's picks are stacked to one M side, its rows of act are
             the N side, and only pick by same pick counts. The picks are then weighted and added in
             registers, in one fixed order.

VALID is chosen so that tasks come out even over the programs: a multiprocessor alone cannot draw
much more than its share of the memory's rate. All ids are held in registers: R <= SLOTS, a power of
two. Slots without an expert are skipped. Rows past VALID are never read out.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
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
)
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.tuning.hopper_tiles import DirectTiles

UNSPECIALIZED = ("R", "num_mapped", "num_local", "desc_rows")
# Of the eight warps that a program has.
MAX_REGISTERS = 104


@gluon.constexpr_function
def everywhere(SLOTS, num_warps):
    """[SLOTS] with a whole copy in every thread, so that picking one value needs no exchange."""
    return gl.BlockedLayout([SLOTS], [32], [num_warps], [0])


@gluon.jit
def load_experts(ids, sizes, SLOTS: gl.constexpr):
    ids_ptr, map_ptr = ids
    R, num_mapped, num_local = sizes
    slot = gl.arange(0, SLOTS, everywhere(SLOTS, gl.num_warps()))
    chosen = gl.load(ids_ptr + slot, mask=slot < R, other=-1, cache_modifier=".cg")
    return local_expert(chosen, map_ptr, num_mapped, num_local)


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
def open_ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """(full, empty) barriers; ARRIVALS of loads fill a stage, one empties it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return full, empty


@gluon.jit
def multiply(ring, x_ring, bars, stage, phase, KSTEPS: gl.constexpr, ACC: gl.constexpr):
    """The products of one task, [rows of the ring, rows of x]."""
    full, empty = bars
    STAGES: gl.constexpr = ring.shape[0]
    M: gl.constexpr = ring.shape[1]
    N: gl.constexpr = x_ring.shape[1]
    acc = gl.zeros([M, N], gl.float32, ACC)
    for _ in range(KSTEPS):
        mbarrier.wait(full.index(stage), phase)
        x = x_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(ring.index(stage), x, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def up_producer(
    descs,
    rings,
    bars,
    ids,
    sizes,
    desc_rows,
    KSTEPS: gl.constexpr,
    TILES: gl.constexpr,
    VALID: gl.constexpr,
    GATED: gl.constexpr,
    SLOTS: gl.constexpr,
):
    low_desc, high_desc, x_desc = descs
    ring, x_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = ring.shape[0]
    TILE: gl.constexpr = ring.shape[1] // 2
    BK: gl.constexpr = ring.shape[2]
    BOX: gl.constexpr = low_desc.block_shape[0]
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    BELOW: gl.constexpr = 0 if GATED else VALID
    tasks = sizes[0] * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    gdc_launch_dependents()
    experts = load_experts(ids, sizes, SLOTS)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    stage = 0
    phase = 1
    while task < tasks:
        row = pick_out(experts, task // TILES) * desc_rows + task % TILES * WIDE
        for k in range(KSTEPS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (2 * VALID + x_ring.shape[1]) * BK * 2)
            for i in gl.static_range(VALID // BOX):
                low = ring.index(stage).slice(i * BOX, BOX, 0)
                high = ring.index(stage).slice(TILE + i * BOX, BOX, 0)
                at = row + i * BOX
                tma.async_copy_global_to_shared(low_desc, [at, k * BK], bar, low)
                tma.async_copy_global_to_shared(high_desc, [at + BELOW, k * BK], bar, high)
            tma.async_copy_global_to_shared(x_desc, [0, k * BK], bar, x_ring.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        task = live_task(task + programs, tasks, experts, programs, TILES)


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


@gluon.jit
def store_token(out_ptr, value, token, column, VALID: gl.constexpr, WIDTH: gl.constexpr):
    """out[column + m] = value[m, token] for m < VALID."""
    layout: gl.constexpr = value.type.layout
    m = gl.expand_dims(gl.arange(0, value.shape[0], gl.SliceLayout(1, layout)), 1)
    n = gl.expand_dims(gl.arange(0, value.shape[1], gl.SliceLayout(0, layout)), 0)
    inside = (n == token) & (m < VALID) & (column + m < WIDTH)
    gl.store(out_ptr + column + m + 0 * n, value.to(out_ptr.dtype.element_ty), inside)


@gluon.jit
def up_consumer(
    bias_ptr,
    out_ptr,
    rings,
    bars,
    ids,
    sizes,
    numbers,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    KSTEPS: gl.constexpr,
    TILES: gl.constexpr,
    VALID: gl.constexpr,
    SLOTS: gl.constexpr,
):
    ring, x_ring = rings
    limit, alpha, beta = numbers
    N: gl.constexpr = x_ring.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    TILE: gl.constexpr = ring.shape[1] // 2
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    BELOW: gl.constexpr = 0 if GATED else VALID
    tasks = sizes[0] * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    experts = load_experts(ids, sizes, SLOTS)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    stage = 0
    phase = 0
    while task < tasks:
        acc, stage, phase = multiply(ring, x_ring, bars, stage, phase, KSTEPS, ACC)
        gate, up = upper_and_lower(acc)
        layout: gl.constexpr = gate.type.layout
        slot = task // TILES
        token = slot // PICKS
        column = task % TILES * WIDE
        if bias_ptr is not None:
            STEP: gl.constexpr = 2 if INTERLEAVED else 1
            TO_UP: gl.constexpr = (1 if INTERLEAVED else I) if GATED else VALID
            expert = pick_out(experts, slot).to(gl.int64)
            at = bias_ptr + expert * (2 * I if GATED else I) + column * STEP
            gate += load_bias(at, STEP, I - column, TILE, layout)
            up += load_bias(at + TO_UP, STEP, I - column - BELOW, TILE, layout)
        out = out_ptr + slot.to(gl.int64) * I
        if GATED:
            act = hopper_activation(FORMULA, gate, up, limit, alpha, beta)
            store_token(out, act, token, column, VALID, I)
        else:
            store_token(out, plain_activation(FORMULA, gate), token, column, VALID, I)
            store_token(out, plain_activation(FORMULA, up), token, column + VALID, VALID, I)
        task = live_task(task + programs, tasks, experts, programs, TILES)


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
    VALID: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Descriptors of w1 as in ``hopper_decode.up_kernel``, of BOX rows, a divisor of VALID."""
    dtype: gl.constexpr = low_desc.dtype
    TOKENS: gl.constexpr = x_desc.block_shape[0]
    KSTEPS: gl.constexpr = (H + BK - 1) // BK
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    rings = (
        gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE, BK], low_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, TOKENS, BK], x_desc.layout),
    )
    bars = open_ring(STAGES, 1)
    ids = (ids_ptr, map_ptr)
    sizes = (R, num_mapped, num_local)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    bias_ptr, out_ptr, rings, bars, ids, sizes, (limit, alpha, beta), I, PICKS,
                    FORMULA, GATED, INTERLEAVED, KSTEPS, TILES, VALID, SLOTS,
                ),
            ),
            (
                up_producer,
                (
                    (low_desc, high_desc, x_desc), rings, bars, ids, sizes, desc_rows, KSTEPS,
                    TILES, VALID, GATED, SLOTS,
                ),
            ),
        ],
        [1],
        [56],
    )  # fmt: skip


@gluon.jit
def load_down(
    task, k, experts, desc, ring, bar, stage,
    H: gl.constexpr, PICKS: gl.constexpr, SHARE: gl.constexpr, VALID: gl.constexpr,
):  # fmt: skip
    """The weight rows of all picks at step k; every pick arrives once, with or without them."""
    TILES: gl.constexpr = (H + VALID - 1) // VALID
    BK: gl.constexpr = ring.shape[2]
    BOX: gl.constexpr = desc.block_shape[0]
    for pick in gl.static_range(PICKS):
        expert = pick_out(experts, task // TILES * PICKS + pick)
        live = expert >= 0
        row = expert * H + task % TILES * VALID
        mbarrier.expect(bar, VALID * BK * 2, pred=live)
        mbarrier.arrive(bar, count=1, pred=expert < 0)
        for i in gl.static_range(VALID // BOX):
            part = ring.index(stage).slice(pick * SHARE + i * BOX, BOX, 0)
            tma.async_copy_global_to_shared(desc, [row + i * BOX, k * BK], bar, part, pred=live)


@gluon.jit
def load_act(
    task, k, act_desc, x_ring, bar, stage, PICKS: gl.constexpr, TILES: gl.constexpr
):  # fmt: skip
    BK: gl.constexpr = x_ring.shape[2]
    mbarrier.expect(bar, x_ring.shape[1] * BK * 2)
    row = task // TILES * PICKS
    tma.async_copy_global_to_shared(act_desc, [row, k * BK], bar, x_ring.index(stage))


@gluon.jit
def down_producer(
    desc,
    act_desc,
    rings,
    bars,
    ids,
    sizes,
    H: gl.constexpr,
    KSTEPS: gl.constexpr,
    PICKS: gl.constexpr,
    SHARE: gl.constexpr,
    VALID: gl.constexpr,
    SLOTS: gl.constexpr,
):
    ring, x_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = ring.shape[0]
    TILES: gl.constexpr = (H + VALID - 1) // VALID
    tasks = sizes[0] // PICKS * TILES
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    # The ids were complete before up_kernel let this launch begin.
    experts = load_experts(ids, sizes, SLOTS)
    task = first + 0
    k = 0
    for stage in range(STAGES):
        if task < tasks:
            bar = full.index(stage)
            load_down(task, k, experts, desc, ring, bar, stage, H, PICKS, SHARE, VALID)
        task, k = next_step(task, k, programs, KSTEPS)
    gdc_wait()
    gdc_launch_dependents()
    task = first + 0
    k = 0
    for stage in range(STAGES):
        if task < tasks:
            load_act(task, k, act_desc, x_ring, full.index(stage), stage, PICKS, TILES)
        task, k = next_step(task, k, programs, KSTEPS)
    stage = 0
    phase = 0
    while task < tasks:
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        load_down(task, k, experts, desc, ring, bar, stage, H, PICKS, SHARE, VALID)
        load_act(task, k, act_desc, x_ring, bar, stage, PICKS, TILES)
        task, k = next_step(task, k, programs, KSTEPS)
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def down_consumer(
    bias_ptr,
    weights_ptr,
    out_ptr,
    stride_out,
    rings,
    bars,
    ids,
    sizes,
    H: gl.constexpr,
    KSTEPS: gl.constexpr,
    PICKS: gl.constexpr,
    SHARE: gl.constexpr,
    VALID: gl.constexpr,
):
    ring, x_ring = rings
    ids_ptr, map_ptr = ids
    R, num_mapped, num_local = sizes
    TILE: gl.constexpr = ring.shape[1]
    N: gl.constexpr = x_ring.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    TILES: gl.constexpr = (H + VALID - 1) // VALID
    m = gl.arange(0, TILE, gl.SliceLayout(1, ACC))
    n = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, ACC)), 0)
    pick = m // SHARE
    at = m % SHARE
    stage = 0
    phase = 0
    for task in range(gl.program_id(0), R // PICKS * TILES, gl.num_programs(0)):
        token = task // TILES
        column = task % TILES * VALID
        slot = token * PICKS + pick
        chosen = gl.load(ids_ptr + slot, mask=pick < PICKS, other=-1, cache_modifier=".cg")
        expert = local_expert(chosen, map_ptr, num_mapped, num_local)
        live = expert >= 0
        inside = (at < VALID) & (column + at < H)
        if weights_ptr is not None:
            weight = gl.load(weights_ptr + slot, mask=live, other=0.0, cache_modifier=".cg")
            weight = weight.to(gl.float32)
        acc, stage, phase = multiply(ring, x_ring, bars, stage, phase, KSTEPS, ACC)
        value = gl.sum(gl.where(gl.expand_dims(pick, 1) == n, acc, 0.0), 1)
        if bias_ptr is not None:
            bias = bias_ptr + expert.to(gl.int64) * H + column + at
            value += gl.load(bias, mask=live & inside, other=0.0).to(gl.float32)
        if weights_ptr is not None:
            value *= weight
        value = gl.where(live & inside, value, 0.0)
        total = gl.sum(gl.reshape(value, [TILE // SHARE, SHARE]), 0)
        row = gl.arange(0, SHARE, total.type.layout)
        out = out_ptr + token.to(gl.int64) * stride_out + column
        gl.store(out + row, total.to(out_ptr.dtype.element_ty), (row < VALID) & (column + row < H))


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
    SLOTS: gl.constexpr,
    TILE: gl.constexpr,
    SHARE: gl.constexpr,
    VALID: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """TILE rows, SHARE of them for each pick, VALID of those loaded."""
    dtype: gl.constexpr = desc.dtype
    N: gl.constexpr = act_desc.block_shape[0]
    KSTEPS: gl.constexpr = (I + BK - 1) // BK
    rings = (
        gl.allocate_shared_memory(dtype, [STAGES, TILE, BK], desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, N, BK], act_desc.layout),
    )
    bars = open_ring(STAGES, PICKS + 1)
    ids = (ids_ptr, map_ptr)
    sizes = (R, num_mapped, num_local)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (
                    bias_ptr, weights_ptr, out_ptr, stride_out, rings, bars, ids, sizes, H,
                    KSTEPS, PICKS, SHARE, VALID,
                ),
            ),
            (
                down_producer,
                (
                    desc, act_desc, rings, bars, ids, sizes, H, KSTEPS, PICKS, SHARE, VALID,
                    SLOTS,
                ),
            ),
        ],
        [1],
        [56],
    )  # fmt: skip


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
    gate, up, desc_rows = gate_up_descriptors(w1, I, activation, tiles.up_box, tiles.depth)
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
        VALID=tiles.up_valid,
        BK=tiles.depth,
        STAGES=tiles.up_stages,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        launch_pdl=True,
    )
    down_kernel[(programs,)](
        matrix_descriptor(w2.view(e * H, I), tiles.down_box, tiles.depth),
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
        SLOTS=slots,
        TILE=tiles.down_rows,
        SHARE=tiles.down_rows // picks,
        VALID=tiles.down_valid,
        BK=tiles.depth,
        STAGES=tiles.down_stages,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        launch_pdl=True,
    )
