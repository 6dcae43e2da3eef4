"""One or two tokens on Hopper: matrix times vector, weights streamed through a ring.

Two persistent Gluon launches, no alignment and no separate sum: a program owns 16 columns of an
output and multiplies on the ordinary units, in fp32. A step is a tile of 16 weight rows x BK
columns (up: 16 of gate and 16 of up), copied by cp.async STAGES steps ahead, whichever task it
belongs to; every thread copies what it reads itself. The vectors lie in shared memory whole.

up_kernel    grid (programs,): x [T, H], w1 -> act [R, I], row = slot. A task is (slot, 16 columns).
down_kernel  grid (programs,): act, w2, weights -> out [T, H]. A task is (token, 16 columns); it
             adds the token's picks in order. Its ring fills before the wait for up_kernel.

All ids are held in registers: R <= SLOTS, a power of two. Slots without an expert are skipped.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.triton.activation import gated_activation, plain_activation
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.tuning.hopper_tiles import VectorTiles

ROWS = gl.constexpr(16)
UNSPECIALIZED = ("R", "num_mapped", "num_local")


@gluon.constexpr_function
def everywhere(SLOTS, num_warps):
    """[SLOTS] with a whole copy in every thread, so that picking one value needs no exchange."""
    return gl.BlockedLayout([SLOTS], [32], [num_warps], [0])


@gluon.constexpr_function
def tile_layout(num_warps):
    """[ROWS, BK]: a warp owns whole rows, a thread 16 bytes of a row."""
    return gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0])


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
def live_pick(task, pick, tasks, experts, programs, PICKS: gl.constexpr, TILES: gl.constexpr):
    """The first (task, pick) from there on that has an expert, or a task past the last."""
    while (task < tasks) & (pick_out(experts, task // TILES * PICKS + pick) < 0):
        last = pick + 1 == PICKS
        pick = gl.where(last, 0, pick + 1)
        task = gl.where(last, task + programs, task)
    return task, pick


@gluon.jit
def fetch_vector(x_ptr, vectors, first, WIDTH: gl.constexpr):
    """Start copying x[0:WIDTH] into vectors[first : first + cdiv(WIDTH, BK)], zero past WIDTH."""
    BK: gl.constexpr = vectors.shape[1]
    CHUNKS: gl.constexpr = (WIDTH + BK - 1) // BK
    column = gl.arange(0, BK, gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    for chunk in range(CHUNKS):
        at = chunk * BK + column
        async_copy.async_copy_global_to_shared(vectors.index(first + chunk), x_ptr + at, at < WIDTH)


@gluon.jit
def fetch_tile(rows, inside, ring, stage, k, WIDTH: gl.constexpr):
    """Start copying columns k : k + BK of ROWS weight rows; zero outside."""
    BK: gl.constexpr = ring.shape[2]
    layout: gl.constexpr = tile_layout(gl.num_warps())
    column = gl.expand_dims(k + gl.arange(0, BK, gl.SliceLayout(0, layout)), 0)
    mask = gl.expand_dims(inside, 1) & (column < WIDTH)
    async_copy.async_copy_global_to_shared(
        ring.index(stage), gl.expand_dims(rows, 1) + column, mask
    )


@gluon.jit
def up_rows(
    task, experts, w_ptr,
    H: gl.constexpr, I: gl.constexpr,  # noqa: E741
    GATED: gl.constexpr, INTERLEAVED: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """(gate rows, up rows, which are inside, which up rows are inside) of a task of up_kernel."""
    WIDE: gl.constexpr = ROWS if GATED else 2 * ROWS
    layout: gl.constexpr = gl.SliceLayout(1, tile_layout(gl.num_warps()))
    column = task % TILES * WIDE + gl.arange(0, ROWS, layout)
    expert = pick_out(experts, task // TILES).to(gl.int64)
    if INTERLEAVED:
        gate = w_ptr + (expert * (2 * I) + 2 * column) * H
        return gate, gate + H, column < I, column < I
    elif GATED:
        gate = w_ptr + (expert * (2 * I) + column) * H
        return gate, gate + I * H, column < I, column < I
    else:
        gate = w_ptr + (expert * I + column) * H
        return gate, gate + ROWS * H, column < I, column + ROWS < I


@gluon.jit
def load_bias(bias_ptr, step, limit, LAYOUT: gl.constexpr):
    """bias[step * m] as fp32 [ROWS], 0 from m = limit on."""
    m = gl.arange(0, ROWS, LAYOUT)
    return gl.load(bias_ptr + step * m, mask=m < limit, other=0.0).to(gl.float32)


@gluon.jit
def store_rows(out_ptr, values, column, WIDTH: gl.constexpr):
    at = column + gl.arange(0, ROWS, values.type.layout)
    gl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), at < WIDTH)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    w_ptr,
    bias_ptr,
    x_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    stride_x,
    R,
    num_mapped,
    num_local,
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
    TOKENS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = w_ptr.dtype.element_ty
    KSTEPS: gl.constexpr = (H + BK - 1) // BK
    WIDE: gl.constexpr = ROWS if GATED else 2 * ROWS
    BELOW: gl.constexpr = 0 if GATED else ROWS
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    layout: gl.constexpr = tile_layout(gl.num_warps())
    across: gl.constexpr = gl.SliceLayout(0, layout)
    down: gl.constexpr = gl.SliceLayout(1, layout)
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    gate_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BK], shared)
    up_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BK], shared)
    vectors = gl.allocate_shared_memory(
        dtype, [TOKENS * KSTEPS, BK], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tasks = R * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    gdc_launch_dependents()
    experts = load_experts(ids_ptr, map_ptr, R, num_mapped, num_local, SLOTS)
    for token in range(R // PICKS):
        fetch_vector(x_ptr + gl.cast(token, gl.int64) * stride_x, vectors, token * KSTEPS, H)
    first = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    ahead = first
    ahead_k = 0
    state = up_rows(ahead, experts, w_ptr, H, I, GATED, INTERLEAVED, TILES)
    for stage in range(STAGES):
        if ahead < tasks:
            fetch_tile(state[0], state[2], gate_ring, stage, ahead_k * BK, H)
            fetch_tile(state[1], state[3], up_ring, stage, ahead_k * BK, H)
        async_copy.commit_group()
        ahead_k += 1
        if ahead_k == KSTEPS:
            ahead_k = 0
            ahead = live_task(ahead + programs, tasks, experts, programs, TILES)
            state = up_rows(ahead, experts, w_ptr, H, I, GATED, INTERLEAVED, TILES)

    stage = 0
    task = first
    while task < tasks:
        slot = task // TILES
        at_x = slot // PICKS * KSTEPS
        gate2 = gl.zeros([ROWS, BK], gl.float32, layout)
        up2 = gl.zeros([ROWS, BK], gl.float32, layout)
        for k in range(KSTEPS):
            async_copy.wait_group(STAGES - 1)
            gl.thread_barrier()
            value = gl.expand_dims(vectors.index(at_x + k).load(across).to(gl.float32), 0)
            gate_tile = gate_ring.index(stage).load(layout)
            up_tile = up_ring.index(stage).load(layout)
            if ahead < tasks:
                fetch_tile(state[0], state[2], gate_ring, stage, ahead_k * BK, H)
                fetch_tile(state[1], state[3], up_ring, stage, ahead_k * BK, H)
            async_copy.commit_group()
            gate2 += gate_tile.to(gl.float32) * value
            up2 += up_tile.to(gl.float32) * value
            ahead_k += 1
            if ahead_k == KSTEPS:
                ahead_k = 0
                ahead = live_task(ahead + programs, tasks, experts, programs, TILES)
                state = up_rows(ahead, experts, w_ptr, H, I, GATED, INTERLEAVED, TILES)
            stage += 1
            if stage == STAGES:
                stage = 0

        gate = gl.sum(gate2, 1)
        up = gl.sum(up2, 1)
        column = task % TILES * WIDE
        if bias_ptr is not None:
            STEP: gl.constexpr = 2 if INTERLEAVED else 1
            TO_UP: gl.constexpr = (1 if INTERLEAVED else I) if GATED else ROWS
            expert = pick_out(experts, slot).to(gl.int64)
            at = bias_ptr + expert * (2 * I if GATED else I) + column * STEP
            gate += load_bias(at, STEP, I - column, down)
            up += load_bias(at + TO_UP, STEP, I - column - BELOW, down)
        out = out_ptr + slot.to(gl.int64) * I
        if GATED:
            store_rows(out, gated_activation(FORMULA, gate, up, limit, alpha, beta), column, I)
        else:
            store_rows(out, plain_activation(FORMULA, gate), column, I)
            store_rows(out, plain_activation(FORMULA, up), column + ROWS, I)
        task = live_task(task + programs, tasks, experts, programs, TILES)


@gluon.jit
def down_rows(
    task, pick, experts, w_ptr,
    H: gl.constexpr, I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """(weight rows, which are inside) of one pick of a task of down_kernel."""
    layout: gl.constexpr = gl.SliceLayout(1, tile_layout(gl.num_warps()))
    column = task % TILES * ROWS + gl.arange(0, ROWS, layout)
    expert = pick_out(experts, task // TILES * PICKS + pick).to(gl.int64)
    return w_ptr + (expert * H + column) * I, column < H


@gluon.jit
def next_chunk(
    task, pick, k, state, tasks, experts, programs, w_ptr,
    H: gl.constexpr, I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr, TILES: gl.constexpr, KSTEPS: gl.constexpr,
):  # fmt: skip
    """The step after (task, pick, k) and the weight rows of its tile."""
    k += 1
    if k == KSTEPS:
        k = 0
        pick += 1
        if pick == PICKS:
            pick = 0
            task += programs
        task, pick = live_pick(task, pick, tasks, experts, programs, PICKS, TILES)
        state = down_rows(task, pick, experts, w_ptr, H, I, PICKS, TILES)
    return task, pick, k, state


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    w_ptr,
    bias_ptr,
    act_ptr,
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
    TOKENS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = w_ptr.dtype.element_ty
    KSTEPS: gl.constexpr = (I + BK - 1) // BK
    TILES: gl.constexpr = (H + ROWS - 1) // ROWS
    layout: gl.constexpr = tile_layout(gl.num_warps())
    across: gl.constexpr = gl.SliceLayout(0, layout)
    down: gl.constexpr = gl.SliceLayout(1, layout)
    copies: gl.constexpr = everywhere(SLOTS, gl.num_warps())
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BK], shared)
    vectors = gl.allocate_shared_memory(
        dtype, [TOKENS * PICKS * KSTEPS, BK], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tasks = R // PICKS * TILES
    programs = gl.num_programs(0)

    # Ids and weights were complete before up_kernel let this launch begin.
    experts = load_experts(ids_ptr, map_ptr, R, num_mapped, num_local, SLOTS)
    if weights_ptr is not None:
        slots = gl.arange(0, SLOTS, copies)
        weights = gl.load(weights_ptr + slots, mask=slots < R, other=0.0, cache_modifier=".cg")
        weights = weights.to(gl.float32)
    else:
        weights = gl.full([SLOTS], 1.0, gl.float32, copies)
    first = gl.program_id(0)
    ahead, pick = live_pick(first, gl.to_tensor(0), tasks, experts, programs, PICKS, TILES)
    k = 0
    state = down_rows(ahead, pick, experts, w_ptr, H, I, PICKS, TILES)
    for stage in range(STAGES):
        if ahead < tasks:
            fetch_tile(state[0], state[1], ring, stage, k * BK, I)
        async_copy.commit_group()
        ahead, pick, k, state = next_chunk(
            ahead, pick, k, state, tasks, experts, programs, w_ptr, H, I, PICKS, TILES, KSTEPS
        )

    gdc_wait()
    gdc_launch_dependents()
    for slot in range(R):
        if pick_out(experts, slot) >= 0:
            fetch_vector(act_ptr + gl.cast(slot, gl.int64) * I, vectors, slot * KSTEPS, I)
    async_copy.commit_group()
    async_copy.wait_group(0)

    stage = 0
    for task in range(first, tasks, programs):
        acc = gl.zeros([ROWS, BK], gl.float32, layout)
        token = task // TILES
        column = task % TILES * ROWS
        offset = gl.zeros([ROWS], gl.float32, down)
        for mine in range(PICKS):
            slot = token * PICKS + mine
            expert = pick_out(experts, slot)
            if expert >= 0:
                weight = pick_out(weights, slot)
                if bias_ptr is not None:
                    at = bias_ptr + expert.to(gl.int64) * H + column
                    offset += weight * load_bias(at, 1, H - column, down)
                for step in range(KSTEPS):
                    async_copy.wait_group(STAGES - 1)
                    gl.thread_barrier()
                    value = vectors.index(slot * KSTEPS + step).load(across)
                    value = value.to(gl.float32) * weight
                    tile = ring.index(stage).load(layout)
                    if ahead < tasks:
                        fetch_tile(state[0], state[1], ring, stage, k * BK, I)
                    async_copy.commit_group()
                    acc += tile.to(gl.float32) * gl.expand_dims(value, 0)
                    ahead, pick, k, state = next_chunk(
                        ahead, pick, k, state, tasks, experts, programs, w_ptr,
                        H, I, PICKS, TILES, KSTEPS,
                    )  # fmt: skip
                    stage += 1
                    if stage == STAGES:
                        stage = 0
        out = out_ptr + token.to(gl.int64) * stride_out
        store_rows(out, gl.sum(acc, 1) + offset, column, H)


def vector(
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
    tiles: VectorTiles,
    programs: int,
) -> None:
    """Launch both kernels; arguments are those of ``kernels.hopper_vector``, checked there."""
    e, H, I = w2.shape  # noqa: E741
    T, K = topk_ids.shape
    R = T * K
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    slots = max(2, 1 << (R - 1).bit_length())
    up_kernel[(programs,)](
        w1,
        w1_bias,
        x,
        act,
        topk_ids,
        expert_map,
        x.stride(0),
        R,
        num_mapped,
        e,
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
        TOKENS=T,
        BK=tiles.up_depth,
        STAGES=tiles.up_stages,
        num_warps=tiles.warps,
        launch_pdl=True,
    )
    down_kernel[(programs,)](
        w2,
        w2_bias,
        act,
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
        TOKENS=T,
        BK=tiles.down_depth,
        STAGES=tiles.down_stages,
        num_warps=tiles.warps,
        launch_pdl=True,
    )
