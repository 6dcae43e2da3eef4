"""The first launch of ``hopper_w8a8_direct``: x [T, H], w1 -> act [R, I]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from fusedmoe.kernels.triton.gluon_names import barrier, reinterpret
from fusedmoe.kernels.triton.hopper_common import Scales, tiles_of, upper_and_lower, wide_of
from fusedmoe.kernels.triton.hopper_direct_common import (
    UNSPECIALIZED,
    Picks,
    live_task,
    load_experts,
    open_ring,
    pick_out,
)
from fusedmoe.kernels.triton.hopper_direct_up import finish_slot, up_producer
from fusedmoe.kernels.triton.hopper_w8a8_direct_common import (
    allocate_rows,
    bring_rows,
    multiply_rows,
    padded_steps,
)
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP, RowPointers
from fusedmoe.kernels.triton.hopper_w8a8_tasks import load_scales, row_scales
from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.jit
def task_scales(scales, task, expert, CASE: gl.constexpr, ACC: gl.constexpr):
    """The scales of a task's rows: [steps, ROWS], or [ROWS] where every row has one."""
    if CASE.GROUP > 0:
        found = load_scales(scales, task, expert, 0, padded_steps(CASE), CASE)
    else:
        found = row_scales(scales, task, expert, CASE, gl.SliceLayout(1, ACC))
    return float_scale(found)


@gluon.jit
def up_consumer(
    x, scales, bias_ptr, out_ptr, ring, buffers, bars, picks, bias_steps, numbers, tokens,
    CASE: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CASE.BN, 32])
    BY_STEP: gl.constexpr = CASE.GROUP > 0
    TILES: gl.constexpr = tiles_of(CASE)
    by_step: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    w_all = reinterpret(buffers[2], gl.float32, [buffers[2].shape[0], CASE.ROWS], by_step)
    tasks = picks.R * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    experts = load_experts(picks, CASE)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    expert = gl.maximum(pick_out(experts, task // TILES), 0)
    w_scale = task_scales(scales, task, expert, CASE, ACC)
    bring_rows(x, 0, tokens, buffers, CASE)
    stage = 0
    phase = 0
    while task < tasks:
        slot = task // TILES
        column = task % TILES * wide_of(CASE)
        if BY_STEP:
            w_all.store(w_scale)
            barrier()
        total, stage, phase = multiply_rows(ring, buffers, bars, stage, phase, CASE, ACC)
        if not BY_STEP:
            total *= gl.expand_dims(w_scale, 1)
        task = live_task(task + programs, tasks, experts, programs, TILES)
        own = expert
        expert = gl.maximum(pick_out(experts, task // TILES), 0)
        w_scale = task_scales(scales, task, expert, CASE, ACC)
        upper, lower = upper_and_lower(total)
        finish_slot(out_ptr, bias_ptr, upper, lower, slot, column, own, bias_steps, numbers, CASE)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    x_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    R,
    num_mapped,
    num_local,
    desc_rows,
    stride_x,
    stride_se,
    stride_sn,
    scale_shard_step,
    scale_row_step,
    scale_block,
    row_shard_step,
    row_step,
    limit,
    alpha,
    beta,
    CASE: gl.constexpr,
):
    """Arguments as in ``hopper_w8a8_gemm``."""
    DTYPE: gl.constexpr = low_desc.dtype
    ring = gl.allocate_shared_memory(DTYPE, [CASE.STAGES, CASE.ROWS, STEP], low_desc.layout)
    buffers = allocate_rows(DTYPE, CASE)
    bars = open_ring(CASE.STAGES, 1)
    picks = Picks(ids_ptr, map_ptr, R, num_mapped, num_local)
    x = RowPointers(x_ptr, stride_x, x_scale_ptr, 0, 0)
    scales = Scales(scale_ptr, stride_se, stride_sn, scale_shard_step, scale_row_step, scale_block)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    x, scales, bias_ptr, out_ptr, ring, buffers, bars, picks,
                    (row_shard_step, row_step), (limit, alpha, beta), R // CASE.PICKS, CASE,
                ),
            ),
            (up_producer, ((low_desc, high_desc), (ring,), bars, picks, desc_rows, CASE)),
        ],
        [1],
        [56],
    )  # fmt: skip
