"""The first launch of ``hopper_w8a8_direct``: x [T, H], w1 -> act [R, I]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from fusedmoe.kernels.triton.gluon_names import barrier, reinterpret
from fusedmoe.kernels.triton.hopper_common import upper_and_lower
from fusedmoe.kernels.triton.hopper_direct_common import (
    UNSPECIALIZED,
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
    padded,
    steps_at_once,
)
from fusedmoe.kernels.triton.hopper_w8a8_rows import STEP
from fusedmoe.kernels.triton.hopper_w8a8_tasks import load_scales, row_scales
from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.jit
def task_scales(
    w_scales, task, expert, N: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
    VALID: gl.constexpr, TILES: gl.constexpr, STEPS: gl.constexpr, GATED: gl.constexpr,
    GROUP: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """The scales of a task's rows: [STEPS, M], or [M] where every row has one."""
    scale_ptr, strides, steps = w_scales
    if GROUP > 0:
        scales = load_scales(
            scale_ptr, strides, steps, task, expert, 0, N, D, M, VALID, TILES, STEPS, GATED, GROUP
        )
    else:
        by_row: gl.constexpr = gl.SliceLayout(1, ACC)
        scales = row_scales(
            scale_ptr, strides, steps, task, expert, N, M, VALID, TILES, GATED, by_row
        )
    return float_scale(scales)


@gluon.jit
def up_consumer(
    x, x_scales, w_scales, bias_ptr, out_ptr, ring, buffers, bars, ids, sizes, bias_steps, numbers,
    tokens, N: gl.constexpr, D: gl.constexpr, PICKS: gl.constexpr, ROUNDING: gl.constexpr,
    E8M0: gl.constexpr, STEPPED: gl.constexpr, GROUP: gl.constexpr, FORMULA: gl.constexpr,
    GATED: gl.constexpr, TILES: gl.constexpr, VALID: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = buffers[0].shape[1]
    M: gl.constexpr = ring.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    BY_STEP: gl.constexpr = GROUP > 0
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    STEPS: gl.constexpr = padded(KSTEPS)
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    w_all = reinterpret(
        buffers[2], gl.float32, [buffers[2].shape[0], M], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    tasks = sizes[0] * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    experts = load_experts(ids, sizes, SLOTS)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    expert = gl.maximum(pick_out(experts, task // TILES), 0)
    w_scale = task_scales(w_scales, task, expert, N, D, M, VALID, TILES, STEPS, GATED, GROUP, ACC)
    bring_rows(x, x_scales, 0, tokens, buffers, D, steps_at_once(KSTEPS, BN), ROUNDING, E8M0)
    stage = 0
    phase = 0
    while task < tasks:
        slot = task // TILES
        column = task % TILES * WIDE
        if BY_STEP:
            w_all.store(w_scale)
            barrier()
        total, stage, phase = multiply_rows(
            ring, buffers, bars, stage, phase, KSTEPS, STEPPED, BY_STEP, ACC
        )
        if not BY_STEP:
            total *= gl.expand_dims(w_scale, 1)
        task = live_task(task + programs, tasks, experts, programs, TILES)
        own = expert
        expert = gl.maximum(pick_out(experts, task // TILES), 0)
        w_scale = task_scales(
            w_scales, task, expert, N, D, M, VALID, TILES, STEPS, GATED, GROUP, ACC
        )
        upper, lower = upper_and_lower(total)
        finish_slot(
            out_ptr, bias_ptr, upper, lower, slot, column, own, bias_steps, numbers, N, PICKS,
            FORMULA, GATED, VALID,
        )  # fmt: skip


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
    N: gl.constexpr,
    D: gl.constexpr,
    PICKS: gl.constexpr,
    ROUNDING: gl.constexpr,
    STEPPED: gl.constexpr,
    GROUP: gl.constexpr,
    E8M0: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    SLOTS: gl.constexpr,
    TILE: gl.constexpr,
    VALID: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Arguments as in ``hopper_w8a8_gemm``; TILE rows each of gate and of up in a stage."""
    DTYPE: gl.constexpr = low_desc.dtype
    KSTEPS: gl.constexpr = (D + STEP - 1) // STEP
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    TILES: gl.constexpr = (N + WIDE - 1) // WIDE
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * TILE, STEP], low_desc.layout)
    buffers = allocate_rows(DTYPE, KSTEPS, BN, 2 * TILE, padded(KSTEPS) if GROUP > 0 else 1)
    bars = open_ring(STAGES, 1)
    ids = (ids_ptr, map_ptr)
    sizes = (R, num_mapped, num_local)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    (x_ptr, stride_x), (x_scale_ptr, 0, 0),
                    (
                        scale_ptr, (stride_se, stride_sn),
                        (scale_shard_step, scale_row_step, scale_block),
                    ),
                    bias_ptr, out_ptr, ring, buffers, bars, ids, sizes,
                    (row_shard_step, row_step), (limit, alpha, beta), R // PICKS, N, D, PICKS,
                    ROUNDING, E8M0, STEPPED, GROUP, FORMULA, GATED, TILES, VALID, SLOTS,
                ),
            ),
            (
                up_producer,
                (
                    (low_desc, high_desc), (ring,), bars, ids, sizes, desc_rows, KSTEPS, TILES,
                    VALID, GATED, SLOTS,
                ),
            ),
        ],
        [1],
        [56],
    )  # fmt: skip
