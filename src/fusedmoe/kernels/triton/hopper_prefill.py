"""Many rows per expert on Hopper: two persistent grouped GEMMs, warp specialised, and a sum.

A tile is 128 rows of one expert (a block of ``moe_align_block_size``) by 2 x 128 weight rows. Four
or one producer warps fill a ring of STAGES steps of 64 columns: weights by TMA, token rows gathered
by cp.async (up) or read as a matrix by TMA (down). Two consumer warpgroups own 64 rows each, share
the weights of a step and run apart by up to STAGES steps, so that the epilogue of one overlaps the
products of the other. A warpgroup whose rows are all padding multiplies nothing.

up_kernel    grid (programs,): x [T, H], w1 -> act [P, I], rows in the order of ``sorted_ids``;
             and position [R]: where a slot's row is.
down_kernel  grid (programs,): act [P, I], w2 -> y [P, H], rows as in act.
sum_kernel   grid (T, cdiv(H, BLOCK)): y, weights, position -> out [T, H] in fp32, one fixed order.

Tiles go round robin over the programs, in groups of GROUP blocks that share weights in the L2.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import (
    gate_up_descriptors,
    hopper_activation,
    matrix_descriptor,
    next_stage,
    rows_layout,
)
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.tuning.hopper_tiles import PrefillTiles

BLOCK_M = gl.constexpr(128)
HALF_M = gl.constexpr(64)
TILE_N = gl.constexpr(128)
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
PART_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
HALF_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
UNSPECIALIZED = ("R", "num_mapped", "num_local", "desc_rows")


@gluon.jit
def tile_of(task, blocks, TILES: gl.constexpr, GROUP: gl.constexpr):
    """(block, column tile): groups of GROUP blocks, column tiles outer, blocks inner."""
    group = task // (GROUP * TILES)
    first = group * GROUP
    size = gl.minimum(blocks - first, GROUP)
    rest = task - first * TILES
    return first + rest % size, rest // size


@gluon.jit
def up_producer(
    descs,
    rings,
    bars,
    x,
    position_ptr,
    tables,
    sizes,
    H: gl.constexpr,
    PICKS: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
):
    a_ring, b_ring = rings
    full, empty = bars
    x_ptr, stride_x = x
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, desc_rows = sizes
    STAGES: gl.constexpr = a_ring.shape[0]
    BK: gl.constexpr = a_ring.shape[2]
    layout: gl.constexpr = rows_layout(BLOCK_M, BK, gl.num_warps())
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(0, layout)), 0)

    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 1
    for task in range(gl.program_id(0), blocks * TILES, gl.num_programs(0)):
        block, tile = tile_of(task, blocks, TILES, GROUP)
        expert = gl.load(expert_ids_ptr + block)
        expert = gl.minimum(gl.maximum(expert, 0), num_local - 1)
        slots = gl.load(sorted_ptr + block * BLOCK_M + row)
        live = (slots >= 0) & (slots < R)
        slots = gl.where(live, slots, 0)
        if tile == 0:
            gl.store(position_ptr + slots, block * BLOCK_M + row, live)
        x_rows = gl.expand_dims(x_ptr + (slots // PICKS).to(gl.int64) * stride_x, 1)
        lives = gl.expand_dims(live, 1)
        weight_row = expert * desc_rows + tile * WIDE
        for k in range(0, H, BK):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * TILE_N * BK * 2)
            low = b_ring.index(stage).slice(0, TILE_N, 0)
            high = b_ring.index(stage).slice(TILE_N, TILE_N, 0)
            tma.async_copy_global_to_shared(descs[0], [weight_row, k], bar, low)
            tma.async_copy_global_to_shared(descs[1], [weight_row + BELOW, k], bar, high)
            async_copy.async_copy_global_to_shared(
                a_ring.index(stage), x_rows + (k + column), lives & (k + column < H)
            )
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def down_producer(
    descs,
    rings,
    bars,
    tables,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
):
    a_ring, b_ring = rings
    full, empty = bars
    act_desc, w_desc = descs
    expert_ids_ptr, num_post_ptr = tables
    STAGES: gl.constexpr = a_ring.shape[0]
    BK: gl.constexpr = a_ring.shape[2]
    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 1
    for task in range(gl.program_id(0), blocks * TILES, gl.num_programs(0)):
        block, tile = tile_of(task, blocks, TILES, GROUP)
        expert = gl.load(expert_ids_ptr + block)
        expert = gl.minimum(gl.maximum(expert, 0), num_local - 1)
        weight_row = expert * H + tile * (2 * TILE_N)
        for k in range(0, I, BK):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (BLOCK_M + 2 * TILE_N) * BK * 2)
            tma.async_copy_global_to_shared(
                act_desc, [block * BLOCK_M, k], bar, a_ring.index(stage)
            )
            tma.async_copy_global_to_shared(w_desc, [weight_row, k], bar, b_ring.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def multiply(rings, bars, stage, phase, live, KSTEPS: gl.constexpr, WHICH: gl.constexpr):
    """One tile's products, [HALF_M, 2 * TILE_N]: rows of this warpgroup times both weight tiles.

    Each step is freed when the next one has been issued.
    """
    a_ring, b_ring = rings
    full, empty = bars
    STAGES: gl.constexpr = a_ring.shape[0]
    acc = gl.zeros([HALF_M, 2 * TILE_N], gl.float32, ACC)
    if live:
        for k in range(KSTEPS):
            mbarrier.wait(full.index(stage), phase)
            a = a_ring.index(stage).slice(WHICH * HALF_M, HALF_M, 0)
            acc = warpgroup_mma(a, b_ring.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            before = (stage + STAGES - 1) % STAGES
            mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
            stage, phase = next_stage(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
    else:
        for _ in range(KSTEPS):
            mbarrier.wait(full.index(stage), phase)
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def halves(acc):
    """The products with the first and with the second weight tile; moves no data."""
    low, high = gl.split(gl.permute(gl.reshape(acc, [HALF_M, 2, TILE_N]), [0, 2, 1]))
    return (
        gl.convert_layout(low, HALF_ACC, assert_trivial=True),
        gl.convert_layout(high, HALF_ACC, assert_trivial=True),
    )


@gluon.jit
def store_tile(desc, buffers, value, row, column):
    """TMA store of [HALF_M, TILE_N] in two parts, by way of this warpgroup's two buffers in turn:
    the part before the last has left its buffer when a part is written."""
    PART: gl.constexpr = buffers.shape[2]
    parts = gl.permute(gl.reshape(value.to(buffers.dtype), [HALF_M, 2, PART]), [0, 2, 1])
    left, right = gl.split(parts)
    store_part(desc, buffers.index(0), gl.convert_layout(left, PART_ACC), row, column)
    store_part(desc, buffers.index(1), gl.convert_layout(right, PART_ACC), row, column + PART)


@gluon.jit
def store_part(desc, buffer, value, row, column):
    tma.store_wait(1)
    gl.thread_barrier()
    buffer.store(value)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, [row, column], buffer)


@gluon.jit
def half_is_live(
    task, blocks, sorted_ptr, R,
    TILES: gl.constexpr, GROUP: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Whether this warpgroup's half of a task's block holds a slot: places fill from the front."""
    live = False
    if task < blocks * TILES:
        block, _ = tile_of(task, blocks, TILES, GROUP)
        slot = gl.load(sorted_ptr + block * BLOCK_M + WHICH * HALF_M)
        live = (slot >= 0) & (slot < R)
    return live


@gluon.jit
def load_bias(bias_ptr, step, limit):
    """bias[step * n] as fp32 [1, TILE_N], 0 from n = limit on."""
    n = gl.arange(0, TILE_N, gl.SliceLayout(0, HALF_ACC))
    bias = gl.load(bias_ptr + step * n, mask=n < limit, other=0.0)
    return gl.expand_dims(bias.to(gl.float32), 0)


@gluon.jit
def up_consumer(
    out_desc,
    buffers,
    bias_ptr,
    rings,
    bars,
    tables,
    sizes,
    numbers,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    TILES: gl.constexpr,
    WIDE: gl.constexpr,
    BELOW: gl.constexpr,
    GROUP: gl.constexpr,
    WHICH: gl.constexpr,
):
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    R, num_local, _ = sizes
    limit, alpha, beta = numbers
    BK: gl.constexpr = rings[0].shape[2]
    KSTEPS: gl.constexpr = (H + BK - 1) // BK
    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 0
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    coming = half_is_live(first, blocks, sorted_ptr, R, TILES, GROUP, WHICH)
    for task in range(first, blocks * TILES, programs):
        block, tile = tile_of(task, blocks, TILES, GROUP)
        row = block * BLOCK_M + WHICH * HALF_M
        live = coming & True
        coming = half_is_live(task + programs, blocks, sorted_ptr, R, TILES, GROUP, WHICH)
        acc, stage, phase = multiply(rings, bars, stage, phase, live, KSTEPS, WHICH)
        if live:
            gate, up = halves(acc)
            column = tile * WIDE
            if bias_ptr is not None:
                STEP: gl.constexpr = 2 if INTERLEAVED else 1
                TO_UP: gl.constexpr = (1 if INTERLEAVED else I) if GATED else TILE_N
                expert = gl.load(expert_ids_ptr + block)
                expert = gl.minimum(gl.maximum(expert, 0), num_local - 1).to(gl.int64)
                at = bias_ptr + expert * (2 * I if GATED else I) + column * STEP
                gate += load_bias(at, STEP, I - column)
                up += load_bias(at + TO_UP, STEP, I - column - BELOW)
            if GATED:
                act = hopper_activation(FORMULA, gate, up, limit, alpha, beta)
                store_tile(out_desc, buffers, act, row, column)
            else:
                store_tile(out_desc, buffers, plain_activation(FORMULA, gate), row, column)
                store_tile(out_desc, buffers, plain_activation(FORMULA, up), row, column + TILE_N)
    tma.store_wait(0)


@gluon.jit
def down_consumer(
    out_desc,
    buffers,
    bias_ptr,
    rings,
    bars,
    tables,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
    WHICH: gl.constexpr,
):
    expert_ids_ptr, sorted_ptr, num_post_ptr = tables
    BK: gl.constexpr = rings[0].shape[2]
    KSTEPS: gl.constexpr = (I + BK - 1) // BK
    blocks = gl.load(num_post_ptr) // BLOCK_M
    stage = 0
    phase = 0
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    coming = half_is_live(first, blocks, sorted_ptr, R, TILES, GROUP, WHICH)
    for task in range(first, blocks * TILES, programs):
        block, tile = tile_of(task, blocks, TILES, GROUP)
        row = block * BLOCK_M + WHICH * HALF_M
        live = coming & True
        coming = half_is_live(task + programs, blocks, sorted_ptr, R, TILES, GROUP, WHICH)
        acc, stage, phase = multiply(rings, bars, stage, phase, live, KSTEPS, WHICH)
        if live:
            low, high = halves(acc)
            column = tile * (2 * TILE_N)
            if bias_ptr is not None:
                expert = gl.load(expert_ids_ptr + block)
                expert = gl.minimum(gl.maximum(expert, 0), num_local - 1).to(gl.int64)
                at = bias_ptr + expert * H + column
                low += load_bias(at, 1, H - column)
                high += load_bias(at + TILE_N, 1, H - column - TILE_N)
            store_tile(out_desc, buffers, low, row, column)
            store_tile(out_desc, buffers, high, row, column + TILE_N)
    tma.store_wait(0)


@gluon.jit
def open_rings(desc, BK: gl.constexpr, STAGES: gl.constexpr, FILLERS: gl.constexpr):
    """(rings, barriers, the output buffers of both warpgroups); FILLERS threads gather beside the
    TMA arrival."""
    dtype: gl.constexpr = desc.dtype
    a_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BK], dtype)
    PART: gl.constexpr = TILE_N // 2
    out_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF_M, PART], dtype)
    rings = (
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BK], a_shared),
        gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE_N, BK], desc.layout),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    out0 = gl.allocate_shared_memory(dtype, [2, HALF_M, PART], out_shared)
    out1 = gl.allocate_shared_memory(dtype, [2, HALF_M, PART], out_shared)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + FILLERS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    return rings, (full, empty), out0, out1


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    out_desc,
    bias_ptr,
    x_ptr,
    position_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    stride_x,
    R,
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
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Descriptors as in ``hopper_decode.up_kernel``: gate and up, or w1 twice without a gate."""
    WIDE: gl.constexpr = TILE_N if GATED else 2 * TILE_N
    BELOW: gl.constexpr = 0 if GATED else TILE_N
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    rings, bars, out0, out1 = open_rings(low_desc, BK, STAGES, 128)
    gdc_wait()
    gdc_launch_dependents()
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    sizes = (R, num_local, desc_rows)
    numbers = (limit, alpha, beta)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    out_desc, out0, bias_ptr, rings, bars, tables, sizes, numbers, H, I,
                    FORMULA, GATED, INTERLEAVED, TILES, WIDE, BELOW, GROUP, 0,
                ),
            ),
            (
                up_consumer,
                (
                    out_desc, out1, bias_ptr, rings, bars, tables, sizes, numbers, H, I,
                    FORMULA, GATED, INTERLEAVED, TILES, WIDE, BELOW, GROUP, 1,
                ),
            ),
            (
                up_producer,
                (
                    (low_desc, high_desc), rings, bars, (x_ptr, stride_x), position_ptr, tables,
                    sizes, H, PICKS, TILES, WIDE, BELOW, GROUP,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    act_desc,
    w_desc,
    out_desc,
    bias_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    R,
    num_local,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    TILES: gl.constexpr = (H + 2 * TILE_N - 1) // (2 * TILE_N)
    rings, bars, out0, out1 = open_rings(w_desc, BK, STAGES, 0)
    gdc_wait()
    gdc_launch_dependents()
    tables = (expert_ids_ptr, sorted_ptr, num_post_ptr)
    gl.warp_specialize(
        [
            (
                down_consumer,
                (
                    out_desc, out0, bias_ptr, rings, bars, tables, R, num_local, H, I, TILES,
                    GROUP, 0,
                ),
            ),
            (
                down_consumer,
                (
                    out_desc, out1, bias_ptr, rings, bars, tables, R, num_local, H, I, TILES,
                    GROUP, 1,
                ),
            ),
            (
                down_producer,
                (
                    (act_desc, w_desc), rings, bars, (expert_ids_ptr, num_post_ptr), num_local,
                    H, I, TILES, GROUP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@triton.jit
def sum_kernel(
    y_ptr,
    weights_ptr,
    position_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    H,
    stride_out,
    num_mapped,
    num_local,
    PICKS: tl.constexpr,
    PADDED_PICKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gdc_wait()
    gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    pick = tl.arange(0, PADDED_PICKS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = token * PICKS + pick
    there = pick < PICKS
    expert = tl.load(ids_ptr + slot, there, -1)
    live = local_expert(expert, map_ptr, num_mapped, num_local) >= 0
    row = tl.load(position_ptr + slot, live, 0, cache_modifier=".cg").to(tl.int64)
    wanted = live[:, None] & (column < H)[None, :]
    at = row[:, None] * H + column[None, :]
    rows = tl.load(y_ptr + at, wanted, 0.0, cache_modifier=".cg").to(tl.float32)
    if weights_ptr is not None:
        rows *= tl.load(weights_ptr + slot, live, 0.0).to(tl.float32)[:, None]
    # As hopper_decode's sum, to the bit: the choice keeps product and sum from being contracted.
    total = tl.sum(tl.where(live[:, None], rows, 0.0), 0)
    tl.store(out_ptr + token * stride_out + column, total, column < H)


def prefill(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    position: torch.Tensor,
    activation: DeviceActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    tables: MoEAlignment,
    tiles: PrefillTiles,
    programs: int,
) -> None:
    """Launch the three kernels; arguments as checked by ``kernels.hopper_prefill``."""
    H = w2.shape[1]
    T, K = topk_ids.shape
    prefill_gemms(
        x, w1, w2, K, act, y, position, activation, w1_bias, w2_bias, tables, tiles, programs
    )
    sum_kernel[(T, triton.cdiv(H, 1024))](
        y,
        topk_weights,
        position,
        topk_ids,
        expert_map,
        out,
        H,
        out.stride(0),
        0 if expert_map is None else expert_map.shape[0],
        w2.shape[0],
        PICKS=K,
        PADDED_PICKS=triton.next_power_of_2(K),
        BLOCK=1024,
        num_warps=4,
        launch_pdl=True,
    )


def prefill_gemms(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    K: int,
    act: torch.Tensor,
    y: torch.Tensor,
    position: torch.Tensor,
    activation: DeviceActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    tables: MoEAlignment,
    tiles: PrefillTiles,
    programs: int,
) -> None:
    """up_kernel and down_kernel alone: rows of y [P, H] in the order of the tables, and position
    [R], where each slot's row is."""
    e, H, I = w2.shape  # noqa: E741
    R = position.shape[0]
    sorted_ids, expert_ids, num_post = tables
    tile_n, half_m = TILE_N.value, HALF_M.value
    low, high, desc_rows = gate_up_descriptors(w1, I, activation, tile_n, tiles.depth)
    up_kernel[(programs,)](
        low,
        high,
        matrix_descriptor(act, half_m, tile_n // 2),
        w1_bias,
        x,
        position,
        expert_ids,
        sorted_ids,
        num_post,
        x.stride(0),
        R,
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
        BK=tiles.depth,
        STAGES=tiles.stages,
        GROUP=tiles.group,
        num_warps=4,
        maxnreg=168,
        launch_pdl=True,
    )
    down_kernel[(programs,)](
        matrix_descriptor(act, BLOCK_M.value, tiles.depth),
        matrix_descriptor(w2.view(e * H, I), 2 * tile_n, tiles.depth),
        matrix_descriptor(y, half_m, tile_n // 2),
        w2_bias,
        expert_ids,
        sorted_ids,
        num_post,
        R,
        e,
        H=H,
        I=I,
        BK=tiles.depth,
        STAGES=tiles.stages,
        GROUP=tiles.group,
        num_warps=4,
        maxnreg=168,
        launch_pdl=True,
    )
