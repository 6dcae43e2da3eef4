"""Few slots per expert on Hopper: quantized weights stream once, as they are stored, to the WGMMA.

Two persistent Gluon launches of one body, and a sum. TILE weight rows (two times TILE / 2: gate and
up, or without a gate two neighbouring tiles) are the M side, the slots of one block (BN) the N
side. 128 bytes of each row per step come by TMA into a ring; every thread takes 32 bytes of a row
from it, makes them numbers in registers, and these are the A operand of the product.

The sum over columns may be taken in any order, so nothing is interleaved or packed anew: the bytes
a thread holds count as the columns that the instruction expects of it, and x is put into the same
order when it is copied to shared memory (``ordered_columns``).

gemm_kernel  grid (programs,): x rows [*, D] (row slot // TOP_K), w -> out [R, N], row = slot, after
             bias and activation. EARLY: the launch before is the first GEMM; weights are loaded
             before it ends, since they depend on nothing.

A task is (block, tile of rows); tasks go round robin over the programs. Blocks come from tables,
or, LONE, every slot is one and the ids are held in registers. Slots without an expert are skipped.
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
from fusedmoe.kernels.triton.hopper_decode import sum_kernel
from fusedmoe.kernels.triton.hopper_direct_common import live_task, load_experts
from fusedmoe.kernels.triton.hopper_launch import HopperLauncher
from fusedmoe.kernels.triton.hopper_quantized_common import (
    HALF_EXPONENT,
    byte_numbers,
    find_slots,
    fragment,
    grouped_layout,
    load_groups,
    put_x,
    row_number,
    store_features,
    stored_layout,
    tile_features,
    word_numbers,
)
from fusedmoe.kernels.triton.hopper_quantized_tasks import (
    STEP_BYTES,
    expert_of,
    issue_rows,
    next_task,
    weight_descriptors,
)
from fusedmoe.kernels.triton.launch import Launcher, power_of_2
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedDecodeTile, QuantizedDecodeTiles

UNSPECIALIZED = ("R", "num_mapped", "num_local", "desc_rows")


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def gemm_kernel(
    low_desc,
    high_desc,
    x_ptr,
    scale_ptr,
    scale2_ptr,
    zero_ptr,
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
    ELEMENT: gl.constexpr,
    GROUP: gl.constexpr,
    SUB: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    LONE: gl.constexpr,
    EARLY: gl.constexpr,
    SLOTS: gl.constexpr,
    TILE: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """desc_rows: rows of one expert as the descriptors count them; the second tile lies ``below``
    rows under the first. GROUP columns share a scale (0: a row does), SUB of them are scaled at
    once."""
    WARPS: gl.constexpr = gl.num_warps()
    HALVES: gl.constexpr = ELEMENT == "int4" or ELEMENT == "e2m1"
    COLUMNS: gl.constexpr = 256 if HALVES else 128
    PER: gl.constexpr = SUB // 2 if HALVES else SUB
    HALF: gl.constexpr = TILE // 2
    WIDE: gl.constexpr = HALF if GATED else TILE
    KSTEPS: gl.constexpr = (D + COLUMNS - 1) // COLUMNS
    TILES: gl.constexpr = (N + WIDE - 1) // WIDE
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    stored: gl.constexpr = stored_layout(TILE, WARPS)
    grouped: gl.constexpr = grouped_layout(TILE, PER, WARPS)
    by_group: gl.constexpr = gl.SliceLayout(2, grouped)
    x_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // COLUMNS, COLUMNS // 8], [WARPS, 1], [1, 0]
    )
    by_slot: gl.constexpr = gl.SliceLayout(1, x_layout)
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, 128], gl.bfloat16)
    ring = gl.allocate_shared_memory(gl.uint8, [STAGES, TILE, STEP_BYTES], low_desc.layout)
    low_x = gl.allocate_shared_memory(gl.bfloat16, [2, BN, 128], x_shared)
    high_x = low_x
    if HALVES:
        high_x = gl.allocate_shared_memory(gl.bfloat16, [2, BN, 128], x_shared)
    bars = open_barriers(STAGES, 0)
    descs = (low_desc, high_desc)

    if not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    # Where the launch is early, ids and tables were complete before the one in front began.
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
    column = gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, x_layout)), 0)
    while task < tasks:
        block = task // TILES
        tile = task % TILES
        expert = expert_of(task, tasks, experts, experts_ptr, num_local, TILES, LONE)
        slots, live = find_slots(block, sorted_ptr, R, LONE, BN, by_slot)
        x_rows = gl.where(live, slots, 0) // TOP_K
        x_ptrs = x_ptr + gl.expand_dims(x_rows.to(gl.int64) * stride_x, 1) + column
        lives = gl.expand_dims(live, 1)
        x = gl.load(x_ptrs, lives & (column < D), 0.0)
        if GROUP != 0:
            shard, feature = tile_features(tile, N, TILE, GATED, gl.SliceLayout(1, by_group))
            at = shard * scale_shard_step + feature // scale_block * scale_row_step
            at = expert.to(gl.int64) * stride_se + at * stride_sn
            zeros = gl.zeros([TILE, COLUMNS // SUB], gl.int64, by_group)
            scale_ptrs = scale_ptr + (gl.expand_dims(at, 1) + zeros)
            scale = load_groups(scale_ptrs, 0, D, SUB, GROUP)
            if zero_ptr is not None:
                zero_ptrs = zero_ptr + (gl.expand_dims(at, 1) + zeros)
                zero = load_groups(zero_ptrs, 0, D, SUB, GROUP)
        acc = gl.zeros([TILE, BN], gl.float32, mma)
        for k in range(KSTEPS):
            mbarrier.wait(bars.index(stage), phase)
            packed = ring.index(stage).load(stored)
            put_x(low_x.index(turn), high_x.index(turn), x, HALVES)
            fence_async_shared()
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
            first = (k + 1) * COLUMNS
            x = gl.load(x_ptrs + first, lives & (first + column < D), 0.0)
            if GROUP != 0:
                factor = scale
                scale = load_groups(scale_ptrs, first, D, SUB, GROUP)
            else:
                factor = None
            middle = None
            if zero_ptr is not None:
                middle = zero
                zero = load_groups(zero_ptrs, first, D, SUB, GROUP)
            x_tile = low_x.index(turn).permute((1, 0))
            if HALVES:
                even, odd = word_numbers(packed, middle, factor, ELEMENT, PER)
                acc = warpgroup_mma(fragment(even, mma), x_tile, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                x_tile = high_x.index(turn).permute((1, 0))
                acc = warpgroup_mma(fragment(odd, mma), x_tile, acc, is_async=True)
            else:
                value = byte_numbers(packed, factor, ELEMENT, PER)
                acc = warpgroup_mma(fragment(value, mma), x_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            turn ^= 1

        eights = gl.permute(gl.reshape(acc, [TILE // 16, 2, 8, BN]), [0, 2, 3, 1])
        upper, lower = gl.split(eights)
        upper = gl.reshape(upper, [HALF, BN])
        lower = gl.reshape(lower, [HALF, BN])
        by_row: gl.constexpr = gl.SliceLayout(1, upper.type.layout)
        m = tile * WIDE + gl.arange(0, HALF, by_row)
        high = m if GATED else m + HALF
        if GROUP == 0:
            scale_at = scale_ptr + expert.to(gl.int64) * stride_se
            step = scale_row_step * stride_sn
            apart = scale_shard_step * stride_sn if GATED else 0
            upper *= row_number(scale_at, m // scale_block, step, m < N)
            lower *= row_number(scale_at + apart, high // scale_block, step, high < N)
        if ELEMENT == "e2m1":
            upper *= HALF_EXPONENT
            lower *= HALF_EXPONENT
        if scale2_ptr is not None:
            SHARDS: gl.constexpr = 2 if GATED else 1
            at = scale2_ptr + expert.to(gl.int64) * SHARDS
            upper *= gl.load(at)
            lower *= gl.load(at + SHARDS - 1)
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
_launch_sum = Launcher(sum_kernel, chained=True)


def gemm(
    x: torch.Tensor,
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
) -> None:
    """One launch; ``addresses`` from ``weight_addresses``."""
    (R, N), D = out.shape, x.shape[1]
    ids, expert_map, lone = None, None, isinstance(blocks, LoneSlots)
    tables: tuple[torch.Tensor | None, ...] = (None, None, None)
    if isinstance(blocks, LoneSlots):
        ids, expert_map = blocks.topk_ids, blocks.expert_map
    else:
        tables = blocks.expert_ids, blocks.sorted_ids, blocks.num_tokens_post_pad
    row_shard_step, row_step, *of_scales = addresses[2:]
    group = w.format.group.col
    group = 0 if group == -1 or group >= D else group
    low, high, desc_rows, below = weight_descriptors(w, tile.rows // 2)
    act = activation or DeviceActivation(formula="", gated=False)
    _launch_gemm(
        programs * tile.per_multiprocessor,
        (low, high),
        (x, w.scale, w.scale2, w.zero_point, bias, out, ids, expert_map, *tables),
        (
            R,
            0 if expert_map is None else expert_map.shape[0],
            w.shape[0],
            desc_rows,
            below,
            x.stride(0),
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
            w.format.element,
            group,
            min(group or 64, 64 if w.format.values == 2 else 32),
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


def decode(
    x: torch.Tensor,
    w1: QuantizedTensor,
    w2: QuantizedTensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    activation: DeviceActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    blocks: MoEAlignment | LoneSlots,
    addresses: tuple[tuple[int, ...], tuple[int, ...]],
    tiles: QuantizedDecodeTiles,
    programs: int,
) -> None:
    """Launch the three kernels; arguments are those of ``kernels.hopper_quantized``."""
    K = topk_ids.shape[1]
    first, second = addresses
    gemm(x, w1, act, w1_bias, activation, blocks, first, K, tiles.gemm1, programs, False)
    gemm(act, w2, y, w2_bias, None, blocks, second, 1, tiles.gemm2, programs, True)
    weighted_sum(y, topk_weights, topk_ids, expert_map, out, w2.shape[0])


def weighted_sum(
    y: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    num_local: int,
) -> None:
    """y fp32 [T * K, H] -> out [T, H]."""
    (T, K), H = topk_ids.shape, out.shape[1]
    warps = 1 if T <= 256 else 4
    _launch_sum(
        (T, -(-H // (256 * warps))),
        (y, topk_weights, topk_ids, expert_map, out),
        (H, out.stride(0), 0 if expert_map is None else expert_map.shape[0], num_local),
        (K, power_of_2(K), 256 * warps),
        warps,
    )
