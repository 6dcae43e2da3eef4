"""The second launch of ``hopper_w8a8_direct``: act [R, I], w2, weights -> out [T, H]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.gluon_names import barrier, reinterpret
from fusedmoe.kernels.triton.hopper_common import next_stage
from fusedmoe.kernels.triton.hopper_direct_common import UNSPECIALIZED, load_experts, open_ring
from fusedmoe.kernels.triton.hopper_direct_down import load_down, load_pick, store_sum
from fusedmoe.kernels.triton.hopper_w8a8_direct_common import (
    allocate_rows,
    bring_rows,
    multiply_rows,
    padded,
    steps_at_once,
)
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP
from fusedmoe.kernels.triton.hopper_w8a8_tasks import scales_layout
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.jit
def down_producer(
    desc, ring, bars, ids, sizes, N: gl.constexpr, KSTEPS: gl.constexpr, PICKS: gl.constexpr,
    SHARE: gl.constexpr, VALID: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Weights depend on nothing, and the ids were complete before the first launch let this one
    begin."""
    full, empty = bars
    STAGES: gl.constexpr = ring.shape[0]
    TILES: gl.constexpr = (N + VALID - 1) // VALID
    experts = load_experts(ids, sizes, SLOTS)
    stage = 0
    phase = 1
    for task in range(gl.program_id(0), sizes[0] // PICKS * TILES, gl.num_programs(0)):
        for k in range(KSTEPS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            load_down(task, k, experts, desc, ring, bar, stage, N, PICKS, SHARE, VALID)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def stacked_scales(
    w_scales, task, ids, sizes, tasks, N: gl.constexpr, D: gl.constexpr, PICKS: gl.constexpr,
    M: gl.constexpr, SHARE: gl.constexpr, VALID: gl.constexpr, STEPS: gl.constexpr,
    GROUP: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """The scales of the rows of all picks, [STEPS, M], or [M] where every row has one."""
    scale_ptr, strides, steps = w_scales
    TILES: gl.constexpr = (N + VALID - 1) // VALID
    parent: gl.constexpr = scales_layout(M, gl.num_warps())
    by_row: gl.constexpr = gl.SliceLayout(0, parent) if GROUP > 0 else gl.SliceLayout(1, ACC)
    m = gl.arange(0, M, by_row)
    pick = m // SHARE
    slot = task // TILES * PICKS + pick
    there = (pick < PICKS) & (task < tasks)
    chosen = gl.load(ids[0] + slot, mask=there, other=-1, cache_modifier=".cg")
    expert = gl.maximum(local_expert(chosen, ids[1], sizes[1], sizes[2]), 0).to(gl.int64)
    feature = gl.minimum(task % TILES * VALID + m % SHARE, N - 1)
    row = expert * strides[0] + feature // steps[2] * steps[1] * strides[1]
    if GROUP > 0:
        column = gl.arange(0, STEPS, gl.SliceLayout(1, parent)) * STEP
        group = gl.minimum(column, D - 1) // GROUP
        return float_scale(gl.load(scale_ptr + gl.expand_dims(row, 0) + gl.expand_dims(group, 1)))
    else:
        return float_scale(gl.load(scale_ptr + row))


@gluon.jit
def down_consumer(
    act, act_scales, w_scales, bias_ptr, weights_ptr, out_ptr, stride_out, ring, buffers, bars, ids,
    sizes, bias_step, N: gl.constexpr, D: gl.constexpr, PICKS: gl.constexpr,
    ROUNDING: gl.constexpr, E8M0: gl.constexpr, STEPPED: gl.constexpr, GROUP: gl.constexpr,
    SHARE: gl.constexpr, VALID: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = ring.shape[1]
    BN: gl.constexpr = buffers[0].shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    BY_STEP: gl.constexpr = GROUP > 0
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    STEPS: gl.constexpr = padded(KSTEPS)
    TILES: gl.constexpr = (N + VALID - 1) // VALID
    w_all = reinterpret(
        buffers[2], gl.float32, [buffers[2].shape[0], M], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    m = gl.arange(0, M, gl.SliceLayout(1, ACC))
    n = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, ACC)), 0)
    pick = m // SHARE
    at = m % SHARE
    tasks = sizes[0] // PICKS * TILES
    programs = gl.num_programs(0)
    task = gl.program_id(0)
    w_scale = stacked_scales(
        w_scales, task, ids, sizes, tasks, N, D, PICKS, M, SHARE, VALID, STEPS, GROUP, ACC
    )
    gdc_wait()
    gdc_launch_dependents()
    brought = -1
    stage = 0
    phase = 0
    while task < tasks:
        token = task // TILES
        column = task % TILES * VALID
        if token != brought:
            bring_rows(
                act, act_scales, token * PICKS, PICKS, buffers, D, steps_at_once(KSTEPS, BN),
                ROUNDING, E8M0,
            )  # fmt: skip
            brought = token
        expert, weight = load_pick(ids, sizes, weights_ptr, token, pick, PICKS)
        if BY_STEP:
            w_all.store(w_scale)
            barrier()
        total, stage, phase = multiply_rows(
            ring, buffers, bars, stage, phase, KSTEPS, STEPPED, BY_STEP, ACC
        )
        value = gl.sum(gl.where(gl.expand_dims(pick, 1) == n, total, 0.0), 1)
        if not BY_STEP:
            value *= w_scale
        task += programs
        w_scale = stacked_scales(
            w_scales, task, ids, sizes, tasks, N, D, PICKS, M, SHARE, VALID, STEPS, GROUP, ACC
        )
        out = out_ptr + token * stride_out
        store_sum(value, weight, bias_ptr, bias_step, expert, at, column, out, N, SHARE, VALID)


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
    N: gl.constexpr,
    D: gl.constexpr,
    PICKS: gl.constexpr,
    ROUNDING: gl.constexpr,
    STEPPED: gl.constexpr,
    GROUP: gl.constexpr,
    E8M0: gl.constexpr,
    SLOTS: gl.constexpr,
    TILE: gl.constexpr,
    SHARE: gl.constexpr,
    VALID: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """TILE rows, SHARE of them for each pick, VALID of those loaded."""
    DTYPE: gl.constexpr = desc.dtype
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, STEP], desc.layout)
    buffers = allocate_rows(DTYPE, KSTEPS, BN, TILE, padded(KSTEPS) if GROUP > 0 else 1)
    bars = open_ring(STAGES, PICKS)
    ids = (ids_ptr, map_ptr)
    sizes = (R, num_mapped, num_local)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (
                    (act_ptr, D), (act_scale_ptr, 0, 0),
                    (scale_ptr, (stride_se, stride_sn), (0, scale_row_step, scale_block)),
                    bias_ptr, weights_ptr, out_ptr, stride_out, ring, buffers, bars, ids, sizes,
                    row_step, N, D, PICKS, ROUNDING, E8M0, STEPPED, GROUP, SHARE, VALID,
                ),
            ),
            (
                down_producer,
                (desc, ring, bars, ids, sizes, N, KSTEPS, PICKS, SHARE, VALID, SLOTS),
            ),
        ],
        [1],
        [56],
    )  # fmt: skip
