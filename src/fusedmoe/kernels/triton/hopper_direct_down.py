"""The second launch of ``hopper_direct``: act [R, I], w2, weights -> out [T, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import next_stage, next_step
from fusedmoe.kernels.triton.hopper_direct_common import (
    UNSPECIALIZED,
    Picks,
    bytes_of,
    down_tiles_of,
    load_experts,
    multiply,
    open_ring,
    pick_out,
)
from fusedmoe.kernels.triton.ids import local_expert


@gluon.jit
def load_down(task, k, experts, desc, ring, bar, stage, CASE: gl.constexpr):
    """The weight rows of all picks at step k; every pick arrives once, with or without them."""
    TILES: gl.constexpr = down_tiles_of(CASE)
    BK: gl.constexpr = ring.shape[2]
    BOX: gl.constexpr = desc.block_shape[0]
    BYTES: gl.constexpr = CASE.VALID * BK * bytes_of(ring.dtype)
    PICKS: gl.constexpr = CASE.PICKS
    for pick in gl.static_range(PICKS):
        expert = pick_out(experts, task // TILES * PICKS + pick)
        live = expert >= 0
        row = expert * CASE.N + task % TILES * CASE.VALID
        mbarrier.expect(bar, BYTES, pred=live)
        mbarrier.arrive(bar, count=1, pred=expert < 0)
        for i in gl.static_range(CASE.VALID // BOX):
            part = ring.index(stage).slice(pick * CASE.SHARE + i * BOX, BOX, 0)
            tma_load(desc, [row + i * BOX, k * BK], bar, part, pred=live)


@gluon.jit
def load_act(task, k, act_desc, x_ring, bar, stage, CASE: gl.constexpr):
    BK: gl.constexpr = x_ring.shape[2]
    mbarrier.expect(bar, x_ring.shape[1] * BK * 2)
    row = task // down_tiles_of(CASE) * CASE.PICKS
    tma_load(act_desc, [row, k * BK], bar, x_ring.index(stage))


@gluon.jit
def down_producer(desc, act_desc, rings, bars, picks, CASE: gl.constexpr):
    ring, x_ring = rings
    full, empty = bars
    BK: gl.constexpr = ring.shape[2]
    KSTEPS: gl.constexpr = (CASE.D + BK - 1) // BK
    tasks = picks.R // CASE.PICKS * down_tiles_of(CASE)
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    # The ids were complete before up_kernel let this launch begin.
    experts = load_experts(picks, CASE)
    task = first + 0
    k = 0
    for stage in range(CASE.STAGES):
        if task < tasks:
            bar = full.index(stage)
            load_down(task, k, experts, desc, ring, bar, stage, CASE)
        task, k = next_step(task, k, programs, KSTEPS)
    gdc_wait()
    gdc_launch_dependents()
    task = first + 0
    k = 0
    for stage in range(CASE.STAGES):
        if task < tasks:
            load_act(task, k, act_desc, x_ring, full.index(stage), stage, CASE)
        task, k = next_step(task, k, programs, KSTEPS)
    stage = 0
    phase = 0
    while task < tasks:
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        load_down(task, k, experts, desc, ring, bar, stage, CASE)
        load_act(task, k, act_desc, x_ring, bar, stage, CASE)
        task, k = next_step(task, k, programs, KSTEPS)
        stage, phase = next_stage(stage, phase, CASE.STAGES)


@gluon.jit
def load_pick(picks, weights_ptr, token, pick, CASE: gl.constexpr):
    """(local expert, -1 for none, and router's weight or 1) of each row's ``pick`` [ROWS]."""
    slot = token * CASE.PICKS + pick
    chosen = gl.load(picks.ids + slot, mask=pick < CASE.PICKS, other=-1, cache_modifier=".cg")
    expert = local_expert(chosen, picks.map, picks.num_mapped, picks.num_local)
    weight = gl.full(pick.shape, 1.0, gl.float32, pick.type.layout)
    if weights_ptr is not None:
        given = gl.load(weights_ptr + slot, mask=expert >= 0, other=0.0, cache_modifier=".cg")
        weight = given.to(gl.float32)
    return expert, weight


@gluon.jit
def store_sum(
    value, weight, bias_ptr, bias_step, expert, at, column, out, CASE: gl.constexpr
):  # fmt: skip
    """The picks' values [ROWS], each with its bias and weight, summed into columns of ``out``.

    ``at`` [ROWS]: which of its pick's SHARE rows each is.
    """
    SHARE: gl.constexpr = CASE.SHARE
    live = (expert >= 0) & (at < CASE.VALID) & (column + at < CASE.N)
    if bias_ptr is not None:
        bias = bias_ptr + expert.to(gl.int64) * CASE.N + (column + at) * bias_step
        value += gl.load(bias, mask=live, other=0.0).to(gl.float32)
    value = gl.where(live, value * weight, 0.0)
    total = gl.sum(gl.reshape(value, [value.shape[0] // SHARE, SHARE]), 0)
    row = gl.arange(0, SHARE, total.type.layout)
    inside = (row < CASE.VALID) & (column + row < CASE.N)
    gl.store(out + column + row, total.to(out.dtype.element_ty), inside)


@gluon.jit
def down_consumer(
    bias_ptr, weights_ptr, out_ptr, stride_out, rings, bars, picks, CASE: gl.constexpr
):  # fmt: skip
    ring, x_ring = rings
    SLOTS: gl.constexpr = x_ring.shape[1]
    BK: gl.constexpr = ring.shape[2]
    KSTEPS: gl.constexpr = (CASE.D + BK - 1) // BK
    TILES: gl.constexpr = down_tiles_of(CASE)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])
    m = gl.arange(0, CASE.ROWS, gl.SliceLayout(1, ACC))
    n = gl.expand_dims(gl.arange(0, SLOTS, gl.SliceLayout(0, ACC)), 0)
    pick = m // CASE.SHARE
    at = m % CASE.SHARE
    stage = 0
    phase = 0
    for task in range(gl.program_id(0), picks.R // CASE.PICKS * TILES, gl.num_programs(0)):
        token = task // TILES
        column = task % TILES * CASE.VALID
        expert, weight = load_pick(picks, weights_ptr, token, pick, CASE)
        acc, stage, phase = multiply(ring, x_ring, bars, stage, phase, KSTEPS, ACC)
        value = gl.sum(gl.where(gl.expand_dims(pick, 1) == n, acc, 0.0), 1)
        out = out_ptr + token.to(gl.int64) * stride_out
        store_sum(value, weight, bias_ptr, 1, expert, at, column, out, CASE)


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
    CASE: gl.constexpr,
):
    dtype: gl.constexpr = desc.dtype
    SLOTS: gl.constexpr = act_desc.block_shape[0]
    BK: gl.constexpr = act_desc.block_shape[1]
    rings = (
        gl.allocate_shared_memory(dtype, [CASE.STAGES, CASE.ROWS, BK], desc.layout),
        gl.allocate_shared_memory(dtype, [CASE.STAGES, SLOTS, BK], act_desc.layout),
    )
    bars = open_ring(CASE.STAGES, CASE.PICKS + 1)
    picks = Picks(ids_ptr, map_ptr, R, num_mapped, num_local)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (bias_ptr, weights_ptr, out_ptr, stride_out, rings, bars, picks, CASE),
            ),
            (down_producer, (desc, act_desc, rings, bars, picks, CASE)),
        ],
        [1],
        [56],
    )
