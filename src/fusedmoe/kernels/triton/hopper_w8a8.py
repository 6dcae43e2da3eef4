"""Few slots per expert on Hopper with both operands in 8 bits: weights stream to the WGMMA.

As ``hopper_quantized``, but the weights are the A operand as they lie in the ring. Where scales
change every 128 columns, 16-bit rows are quantized on their way to shared memory, and each step's
product is added to the sum in fp32 with its scales; where a whole row shares a scale, rows come
quantized, and one sum runs through.

gemm_kernel  grid (programs,): x rows [*, D] (row slot // TOP_K), w -> out [R, N], row = slot, after
             bias and activation. EARLY, LONE and tasks as in ``hopper_quantized``.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import hopper_activation, next_stage, open_barriers
from fusedmoe.kernels.triton.hopper_direct_common import live_task, load_experts
from fusedmoe.kernels.triton.hopper_launch import HopperLauncher
from fusedmoe.kernels.triton.hopper_quantized_common import (
    find_slots,
    row_number,
    store_features,
    tile_features,
)
from fusedmoe.kernels.triton.hopper_quantized_tasks import (
    STEP_BYTES,
    expert_of,
    issue_rows,
    next_task,
    weight_descriptors,
)
from fusedmoe.kernels.triton.launch import power_of_2
from fusedmoe.kernels.triton.quantize import quantized, scale_of
from fusedmoe.kernels.triton.quantized_common import float_scale
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedDecodeTile

UNSPECIALIZED = ("R", "num_mapped", "num_local", "desc_rows")


@gluon.jit
def upper_and_lower(acc):
    """The two halves of the rows of acc, in one layout."""
    HALF: gl.constexpr = acc.shape[0] // 2
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, N, 2], [32, 1, 1], [gl.num_warps(), 1, 1], [2, 1, 0]
    )
    pairs = gl.permute(gl.reshape(acc, [2, HALF, N]), [1, 2, 0])
    return gl.split(gl.convert_layout(pairs, layout))


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def gemm_kernel(
    low_desc,
    high_desc,
    x_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    experts_ptr,
    sorted_ptr,
    num_post_ptr,
    R,
    num_mapped,
    num_local,
    desc_rows,
    below,
    stride_x,
    stride_xs,
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
    TOP_K: gl.constexpr,
    STEPPED: gl.constexpr,
    GROUP: gl.constexpr,
    E8M0: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    LONE: gl.constexpr,
    EARLY: gl.constexpr,
    SLOTS: gl.constexpr,
    TILE: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """STEPPED: x is 16-bit and quantized by steps, weights have a scale per GROUP columns (a
    multiple of a step). Otherwise x has the weights' dtype and x_scale one number per row (stride
    0: one for all)."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = low_desc.dtype
    SUM: gl.constexpr = gl.int32 if gl.int8 == DTYPE else gl.float32
    HALF: gl.constexpr = TILE // 2
    WIDE: gl.constexpr = HALF if GATED else TILE
    KSTEPS: gl.constexpr = (D + STEP_BYTES - 1) // STEP_BYTES
    TILES: gl.constexpr = (N + WIDE - 1) // WIDE
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    by_slot: gl.constexpr = gl.SliceLayout(1, x_layout)
    x_shared: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=8, rank=2
    )
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, STEP_BYTES], low_desc.layout)
    x_ring = gl.allocate_shared_memory(DTYPE, [2, BN, STEP_BYTES], x_shared)
    scale_ring = gl.allocate_shared_memory(gl.float32, [2, BN], flat)
    bars = open_barriers(STAGES, 0)
    descs = (low_desc, high_desc)

    if not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    experts = 0
    programs = gl.num_programs(0)
    if LONE:
        experts = load_experts((ids_ptr, map_ptr), (R, num_mapped, num_local), SLOTS)
        tasks = R * TILES
        task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    else:
        tasks = gl.load(num_post_ptr, cache_modifier=".cg") // BN * TILES
        task = gl.program_id(0)
    ahead = task + 0
    ahead_k = 0
    expert = expert_of(ahead, tasks, experts, experts_ptr, num_local, TILES, LONE)
    row = expert * desc_rows + ahead % TILES * WIDE
    coming = next_task(ahead, tasks, programs, experts, TILES, LONE)
    coming_expert = expert_of(coming, tasks, experts, experts_ptr, num_local, TILES, LONE)
    for stage in range(STAGES):
        if ahead < tasks:
            issue_rows(descs, ring, bars, stage, (row, row + below), ahead_k * STEP_BYTES)
        ahead_k += 1
        if ahead_k == KSTEPS:
            ahead_k = 0
            ahead = coming + 0
            row = coming_expert * desc_rows + ahead % TILES * WIDE
            coming = next_task(ahead, tasks, programs, experts, TILES, LONE)
            coming_expert = expert_of(coming, tasks, experts, experts_ptr, num_local, TILES, LONE)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()

    stage = 0
    phase = 0
    turn = 0
    column = gl.expand_dims(gl.arange(0, STEP_BYTES, gl.SliceLayout(0, x_layout)), 0)
    while task < tasks:
        block = task // TILES
        tile = task % TILES
        expert = expert_of(task, tasks, experts, experts_ptr, num_local, TILES, LONE)
        slots, live = find_slots(block, sorted_ptr, R, LONE, BN, by_slot)
        x_rows = gl.where(live, slots, 0) // TOP_K
        x_ptrs = x_ptr + gl.expand_dims(x_rows.to(gl.int64) * stride_x, 1) + column
        lives = gl.expand_dims(live, 1)
        x = gl.load(x_ptrs, lives & (column < D), 0.0)
        shard, feature = tile_features(tile, N, TILE, GATED, by_row)
        at = shard * scale_shard_step + feature // scale_block * scale_row_step
        w_ptrs = scale_ptr + expert.to(gl.int64) * stride_se + at * stride_sn
        w_scale = gl.load(w_ptrs)
        total = gl.zeros([TILE, BN], SUM, mma)
        for k in range(KSTEPS):
            if STEPPED:
                wide = x.to(gl.float32)
                x_scale = scale_of(wide, 1, DTYPE, E8M0)
                x_ring.index(turn).store(quantized(wide, gl.expand_dims(x_scale, 1), DTYPE))
                scale_ring.index(turn).store(x_scale)
            else:
                x_ring.index(turn).store(x)
            fence_async_shared()
            gl.thread_barrier()
            first = (k + 1) * STEP_BYTES
            x = gl.load(x_ptrs + first, lives & (first + column < D), 0.0)
            mbarrier.wait(bars.index(stage), phase)
            x_tile = x_ring.index(turn).permute((1, 0))
            if STEPPED:
                part = gl.zeros([TILE, BN], gl.float32, mma)
                part = warpgroup_mma(ring.index(stage), x_tile, part, use_acc=False, is_async=True)
                x_scale = scale_ring.index(turn).load(gl.SliceLayout(0, mma))
                factor = gl.expand_dims(float_scale(w_scale), 1) * gl.expand_dims(x_scale, 0)
                w_scale = gl.load(w_ptrs + gl.minimum(first, D - 1) // GROUP)
                part = warpgroup_mma_wait(0, deps=(part,))
                total += part * factor
            else:
                total = warpgroup_mma(ring.index(stage), x_tile, total, is_async=True)
                total = warpgroup_mma_wait(0, deps=(total,))
            gl.thread_barrier()
            if ahead < tasks:
                issue_rows(descs, ring, bars, stage, (row, row + below), ahead_k * STEP_BYTES)
            ahead_k += 1
            if ahead_k == KSTEPS:
                ahead_k = 0
                ahead = coming + 0
                row = coming_expert * desc_rows + ahead % TILES * WIDE
                coming = next_task(ahead, tasks, programs, experts, TILES, LONE)
                coming_expert = expert_of(
                    coming, tasks, experts, experts_ptr, num_local, TILES, LONE
                )
            stage, phase = next_stage(stage, phase, STAGES)
            turn ^= 1

        if not STEPPED:
            by_token: gl.constexpr = gl.SliceLayout(0, mma)
            slots, live = find_slots(block, sorted_ptr, R, LONE, BN, by_token)
            x_rows = gl.where(live, slots, 0) // TOP_K
            x_scale = gl.load(x_scale_ptr + x_rows.to(gl.int64) * stride_xs)
            factor = gl.expand_dims(float_scale(w_scale), 1) * gl.expand_dims(x_scale, 0)
            total = total.to(gl.float32) * factor
        upper, lower = upper_and_lower(total)
        rows: gl.constexpr = gl.SliceLayout(1, upper.type.layout)
        m = tile * WIDE + gl.arange(0, HALF, rows)
        high = m if GATED else m + HALF
        if bias_ptr is not None:
            at = bias_ptr + expert.to(gl.int64) * (2 * N if GATED else N)
            apart = row_shard_step if GATED else 0
            upper += row_number(at, m, row_step, m < N)
            lower += row_number(at + apart, high, row_step, high < N)
        if GATED:
            act = hopper_activation(FORMULA, upper, lower, limit, alpha, beta)
            store_features(out_ptr, act, block, sorted_ptr, R, tile * WIDE, N, LONE)
        else:
            if FORMULA is not None:
                upper = plain_activation(FORMULA, upper)
                lower = plain_activation(FORMULA, lower)
            store_features(out_ptr, upper, block, sorted_ptr, R, tile * WIDE, N, LONE)
            store_features(out_ptr, lower, block, sorted_ptr, R, tile * WIDE + HALF, N, LONE)
        task = next_task(task, tasks, programs, experts, TILES, LONE)


_launch_gemm = HopperLauncher(gemm_kernel)


def gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: QuantizedTensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    activation: DeviceActivation | None,
    blocks: MoEAlignment | LoneSlots,
    addresses: tuple[int, ...],
    top_k: int,
    tile: QuantizedDecodeTile,
    programs: int,
    early: bool,
    e8m0: bool,
) -> None:
    """One launch; ``addresses`` from ``weight_addresses``; x_scale None: x is 16-bit."""
    (R, N), D = out.shape, x.shape[1]
    ids, expert_map, lone = None, None, isinstance(blocks, LoneSlots)
    tables: tuple[torch.Tensor | None, ...] = (None, None, None)
    if isinstance(blocks, LoneSlots):
        ids, expert_map = blocks.topk_ids, blocks.expert_map
    else:
        tables = blocks.expert_ids, blocks.sorted_ids, blocks.num_tokens_post_pad
    row_shard_step, row_step, *of_scales = addresses[2:]
    low, high, desc_rows, below = weight_descriptors(w, tile.rows // 2, as_bytes=False)
    act = activation or DeviceActivation(formula="", gated=False)
    shared = x_scale is None or x_scale.numel() == 1
    _launch_gemm(
        programs * tile.per_multiprocessor,
        (low, high),
        (x, x_scale, w.scale, bias, out, ids, expert_map, *tables),
        (
            R,
            0 if expert_map is None else expert_map.shape[0],
            w.shape[0],
            desc_rows,
            below,
            x.stride(0),
            0 if shared or x_scale is None else x_scale.stride(0),
            *of_scales,
            row_shard_step,
            row_step,
            act.limit,
            act.alpha,
            act.beta,
        ),
        (
            N,
            D,
            top_k,
            x_scale is None,
            max(w.format.group.col, 1),
            e8m0,
            act.formula or None,
            act.gated,
            lone,
            early,
            max(2, power_of_2(R)) if lone else 2,
            tile.rows,
            tile.slots,
            tile.stages,
        ),
        num_warps=tile.rows // 16,
        maxnreg=tile.registers,
    )
