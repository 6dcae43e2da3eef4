"""The second launch of ``hopper_direct``: act [R, I], w2, weights -> out [T, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import next_stage, next_step
from fusedmoe.kernels.triton.hopper_direct_common import (
    UNSPECIALIZED,
    bytes_of,
    load_experts,
    multiply,
    open_ring,
    pick_out,
)
from fusedmoe.kernels.triton.ids import local_expert


@gluon.jit
def load_down(
    task, k, experts, desc, ring, bar, stage,
    H: gl.constexpr, PICKS: gl.constexpr, SHARE: gl.constexpr, VALID: gl.constexpr,
):  # fmt: skip
    """The weight rows of all picks at step k; every pick arrives once, with or without them."""
    TILES: gl.constexpr = (H + VALID - 1) // VALID
    BK: gl.constexpr = ring.shape[2]
    BOX: gl.constexpr = desc.block_shape[0]
    BYTES: gl.constexpr = VALID * BK * bytes_of(ring.dtype)
    for pick in gl.static_range(PICKS):
        expert = pick_out(experts, task // TILES * PICKS + pick)
        live = expert >= 0
        row = expert * H + task % TILES * VALID
        mbarrier.expect(bar, BYTES, pred=live)
        mbarrier.arrive(bar, count=1, pred=expert < 0)
        for i in gl.static_range(VALID // BOX):
            part = ring.index(stage).slice(pick * SHARE + i * BOX, BOX, 0)
            tma_load(desc, [row + i * BOX, k * BK], bar, part, pred=live)


@gluon.jit
def load_act(
    task, k, act_desc, x_ring, bar, stage, PICKS: gl.constexpr, TILES: gl.constexpr
):  # fmt: skip
    BK: gl.constexpr = x_ring.shape[2]
    mbarrier.expect(bar, x_ring.shape[1] * BK * 2)
    row = task // TILES * PICKS
    tma_load(act_desc, [row, k * BK], bar, x_ring.index(stage))


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
def load_pick(ids, sizes, weights_ptr, token, pick, PICKS: gl.constexpr):
    """(local expert, -1 for none, and router's weight or 1) of each row's ``pick`` [TILE]."""
    ids_ptr, map_ptr = ids
    slot = token * PICKS + pick
    chosen = gl.load(ids_ptr + slot, mask=pick < PICKS, other=-1, cache_modifier=".cg")
    expert = local_expert(chosen, map_ptr, sizes[1], sizes[2])
    weight = gl.full(pick.shape, 1.0, gl.float32, pick.type.layout)
    if weights_ptr is not None:
        given = gl.load(weights_ptr + slot, mask=expert >= 0, other=0.0, cache_modifier=".cg")
        weight = given.to(gl.float32)
    return expert, weight


@gluon.jit
def store_sum(
    value, weight, bias_ptr, bias_step, expert, at, column, out,
    H: gl.constexpr, SHARE: gl.constexpr, VALID: gl.constexpr,
):  # fmt: skip
    """The picks' values [TILE], each with its bias and weight, summed into columns of ``out``.

    ``at`` [TILE]: which of its pick's SHARE rows each is.
    """
    live = (expert >= 0) & (at < VALID) & (column + at < H)
    if bias_ptr is not None:
        bias = bias_ptr + expert.to(gl.int64) * H + (column + at) * bias_step
        value += gl.load(bias, mask=live, other=0.0).to(gl.float32)
    value = gl.where(live, value * weight, 0.0)
    total = gl.sum(gl.reshape(value, [value.shape[0] // SHARE, SHARE]), 0)
    row = gl.arange(0, SHARE, total.type.layout)
    inside = (row < VALID) & (column + row < H)
    gl.store(out + column + row, total.to(out.dtype.element_ty), inside)


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
    for task in range(gl.program_id(0), sizes[0] // PICKS * TILES, gl.num_programs(0)):
        token = task // TILES
        column = task % TILES * VALID
        expert, weight = load_pick(ids, sizes, weights_ptr, token, pick, PICKS)
        acc, stage, phase = multiply(ring, x_ring, bars, stage, phase, KSTEPS, ACC)
        value = gl.sum(gl.where(gl.expand_dims(pick, 1) == n, acc, 0.0), 1)
        out = out_ptr + token.to(gl.int64) * stride_out
        store_sum(value, weight, bias_ptr, 1, expert, at, column, out, H, SHARE, VALID)


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
