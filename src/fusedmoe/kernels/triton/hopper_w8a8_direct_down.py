"""The second launch of ``hopper_w8a8_direct``: act [R, I], w2, weights -> out [T, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import barrier, reinterpret
from fusedmoe.kernels.triton.hopper_common import Scales, next_stage
from fusedmoe.kernels.triton.hopper_direct_common import (
    UNSPECIALIZED,
    Picks,
    down_tiles_of,
    load_experts,
    open_ring,
)
from fusedmoe.kernels.triton.hopper_direct_down import load_down, load_pick, store_sum
from fusedmoe.kernels.triton.hopper_w8a8_direct_common import (
    allocate_rows,
    bring_rows,
    multiply_rows,
    padded_steps,
    steps_of,
)
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP, RowPointers
from fusedmoe.kernels.triton.hopper_w8a8_tasks import scales_layout
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.jit
def down_producer(desc, ring, bars, picks, CASE: gl.constexpr):
    """Weights depend on nothing, and the ids were complete before the first launch let this one
    begin."""
    full, empty = bars
    TILES: gl.constexpr = down_tiles_of(CASE)
    experts = load_experts(picks, CASE)
    stage = 0
    phase = 1
    for task in range(gl.program_id(0), picks.R // CASE.PICKS * TILES, gl.num_programs(0)):
        for k in range(steps_of(CASE)):
            mbarrier.wait(empty.index(stage), phase)
            load_down(task, k, experts, desc, ring, full.index(stage), stage, CASE)
            stage, phase = next_stage(stage, phase, CASE.STAGES)


@gluon.jit
def stacked_scales(scales, task, picks, tasks, CASE: gl.constexpr, ACC: gl.constexpr):
    """The scales of the rows of all picks, [steps, ROWS], or [ROWS] where every row has one."""
    GROUP: gl.constexpr = CASE.GROUP
    TILES: gl.constexpr = down_tiles_of(CASE)
    parent: gl.constexpr = scales_layout(CASE.ROWS, gl.num_warps())
    by_row: gl.constexpr = gl.SliceLayout(0, parent) if GROUP > 0 else gl.SliceLayout(1, ACC)
    m = gl.arange(0, CASE.ROWS, by_row)
    pick = m // CASE.SHARE
    slot = task // TILES * CASE.PICKS + pick
    there = (pick < CASE.PICKS) & (task < tasks)
    chosen = gl.load(picks.ids + slot, mask=there, other=-1, cache_modifier=".cg")
    local = local_expert(chosen, picks.map, picks.num_mapped, picks.num_local)
    expert = gl.maximum(local, 0).to(gl.int64)
    feature = gl.minimum(task % TILES * CASE.VALID + m % CASE.SHARE, CASE.N - 1)
    row = expert * scales.stride_expert
    row += feature // scales.block * scales.row_step * scales.stride_row
    if GROUP > 0:
        column = gl.arange(0, padded_steps(CASE), gl.SliceLayout(1, parent)) * STEP
        group = gl.minimum(column, CASE.D - 1) // GROUP
        own = scales.pointer + gl.expand_dims(row, 0)
        return float_scale(gl.load(own + gl.expand_dims(group, 1)))
    else:
        return float_scale(gl.load(scales.pointer + row))


@gluon.jit
def down_consumer(
    act, scales, bias_ptr, weights_ptr, out_ptr, stride_out, ring, buffers, bars, picks, bias_step,
    CASE: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = CASE.BN
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    BY_STEP: gl.constexpr = CASE.GROUP > 0
    TILES: gl.constexpr = down_tiles_of(CASE)
    by_step: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    w_all = reinterpret(buffers[2], gl.float32, [buffers[2].shape[0], CASE.ROWS], by_step)
    m = gl.arange(0, CASE.ROWS, gl.SliceLayout(1, ACC))
    n = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, ACC)), 0)
    pick = m // CASE.SHARE
    at = m % CASE.SHARE
    tasks = picks.R // CASE.PICKS * TILES
    programs = gl.num_programs(0)
    task = gl.program_id(0)
    w_scale = stacked_scales(scales, task, picks, tasks, CASE, ACC)
    gdc_wait()
    gdc_launch_dependents()
    brought = -1
    stage = 0
    phase = 0
    while task < tasks:
        token = task // TILES
        column = task % TILES * CASE.VALID
        if token != brought:
            bring_rows(act, token * CASE.PICKS, CASE.PICKS, buffers, CASE)
            brought = token
        expert, weight = load_pick(picks, weights_ptr, token, pick, CASE)
        if BY_STEP:
            w_all.store(w_scale)
            barrier()
        total, stage, phase = multiply_rows(ring, buffers, bars, stage, phase, CASE, ACC)
        value = gl.sum(gl.where(gl.expand_dims(pick, 1) == n, total, 0.0), 1)
        if not BY_STEP:
            value *= w_scale
        task += programs
        w_scale = stacked_scales(scales, task, picks, tasks, CASE, ACC)
        out = out_ptr + token * stride_out
        store_sum(value, weight, bias_ptr, bias_step, expert, at, column, out, CASE)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    desc,
    act_ptr,
    act_scale_ptr,
    scale_ptr,
    bias_ptr,
    weights_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    stride_out,
    R,
    num_mapped,
    num_local,
    stride_se,
    stride_sn,
    scale_row_step,
    scale_block,
    row_step,
    CASE: gl.constexpr,
):
    DTYPE: gl.constexpr = desc.dtype
    ring = gl.allocate_shared_memory(DTYPE, [CASE.STAGES, CASE.ROWS, STEP], desc.layout)
    buffers = allocate_rows(DTYPE, CASE)
    bars = open_ring(CASE.STAGES, CASE.PICKS)
    picks = Picks(ids_ptr, map_ptr, R, num_mapped, num_local)
    act = RowPointers(act_ptr, CASE.D, act_scale_ptr, 0, 0)
    scales = Scales(scale_ptr, stride_se, stride_sn, 0, scale_row_step, scale_block)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (
                    act, scales, bias_ptr, weights_ptr, out_ptr, stride_out, ring, buffers, bars,
                    picks, row_step, CASE,
                ),
            ),
            (down_producer, (desc, ring, bars, picks, CASE)),
        ],
        [1],
        [56],
    )  # fmt: skip
