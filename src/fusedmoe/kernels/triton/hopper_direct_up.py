"""The first launch of ``hopper_direct``: x [T, H], w1 -> act [R, I]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.gluon_names import tma_load
from fusedmoe.kernels.triton.hopper_common import (
    hopper_activation,
    load_bias,
    next_stage,
    upper_and_lower,
)
from fusedmoe.kernels.triton.hopper_direct_common import (
    UNSPECIALIZED,
    bytes_of,
    live_task,
    load_experts,
    multiply,
    open_ring,
    pick_out,
)


@gluon.jit
def up_producer(
    descs,
    rings,
    bars,
    ids,
    sizes,
    desc_rows,
    KSTEPS: gl.constexpr,
    TILES: gl.constexpr,
    VALID: gl.constexpr,
    GATED: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Fill the rings: (weights, rows of x) by (low, high, x), or weights alone."""
    low_desc, high_desc = descs[0], descs[1]
    ring = rings[0]
    full, empty = bars
    STAGES: gl.constexpr = ring.shape[0]
    TILE: gl.constexpr = ring.shape[1] // 2
    BK: gl.constexpr = ring.shape[2]
    BOX: gl.constexpr = low_desc.block_shape[0]
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    BELOW: gl.constexpr = 0 if GATED else VALID
    BYTES: gl.constexpr = BK * bytes_of(ring.dtype)
    X_ROWS: gl.constexpr = rings[1].shape[1] if len(rings) == 2 else 0
    tasks = sizes[0] * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    gdc_launch_dependents()
    experts = load_experts(ids, sizes, SLOTS)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    stage = 0
    phase = 1
    while task < tasks:
        row = pick_out(experts, task // TILES) * desc_rows + task % TILES * WIDE
        for k in range(KSTEPS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (2 * VALID + X_ROWS) * BYTES)
            for i in gl.static_range(VALID // BOX):
                low = ring.index(stage).slice(i * BOX, BOX, 0)
                high = ring.index(stage).slice(TILE + i * BOX, BOX, 0)
                at = row + i * BOX
                tma_load(low_desc, [at, k * BK], bar, low)
                tma_load(high_desc, [at + BELOW, k * BK], bar, high)
            if len(rings) == 2:
                x_stage = rings[1].index(stage)
                tma_load(descs[2], [0, k * BK], bar, x_stage)
            stage, phase = next_stage(stage, phase, STAGES)
        task = live_task(task + programs, tasks, experts, programs, TILES)


@gluon.jit
def store_token(out_ptr, value, token, column, VALID: gl.constexpr, WIDTH: gl.constexpr):
    """out[column + m] = value[m, token] for m < VALID."""
    layout: gl.constexpr = value.type.layout
    m = gl.expand_dims(gl.arange(0, value.shape[0], gl.SliceLayout(1, layout)), 1)
    n = gl.expand_dims(gl.arange(0, value.shape[1], gl.SliceLayout(0, layout)), 0)
    inside = (n == token) & (m < VALID) & (column + m < WIDTH)
    gl.store(out_ptr + column + m + 0 * n, value.to(out_ptr.dtype.element_ty), inside)


@gluon.jit
def finish_slot(
    out_ptr, bias_ptr, gate, up, slot, column, expert, bias_steps, numbers,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr, FORMULA: gl.constexpr, GATED: gl.constexpr, VALID: gl.constexpr,
):  # fmt: skip
    """Biases, activation and store of a slot's features from ``column`` on: both halves of a
    tile's rows, gate and up of the same VALID features or, not GATED, neighbours.

    bias_steps: (from gate to up, from feature to feature); numbers: (limit, alpha, beta).
    """
    if bias_ptr is not None:
        TILE: gl.constexpr = gate.shape[0]
        layout: gl.constexpr = gate.type.layout
        STRIDE: gl.constexpr = 2 * I if GATED else I
        BELOW: gl.constexpr = 0 if GATED else VALID
        at = bias_ptr + expert.to(gl.int64) * STRIDE + column * bias_steps[1]
        to_up = bias_steps[0] if GATED else VALID * bias_steps[1]
        gate += load_bias(at, bias_steps[1], I - column, TILE, layout)
        up += load_bias(at + to_up, bias_steps[1], I - column - BELOW, TILE, layout)
    out = out_ptr + slot * I
    token = slot // PICKS
    if GATED:
        act = hopper_activation(FORMULA, gate, up, numbers[0], numbers[1], numbers[2])
        store_token(out, act, token, column, VALID, I)
    else:
        store_token(out, plain_activation(FORMULA, gate), token, column, VALID, I)
        store_token(out, plain_activation(FORMULA, up), token, column + VALID, VALID, I)


@gluon.jit
def up_consumer(
    bias_ptr,
    out_ptr,
    rings,
    bars,
    ids,
    sizes,
    numbers,
    I: gl.constexpr,  # noqa: E741
    PICKS: gl.constexpr,
    FORMULA: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    KSTEPS: gl.constexpr,
    TILES: gl.constexpr,
    VALID: gl.constexpr,
    SLOTS: gl.constexpr,
):
    ring, x_ring = rings
    N: gl.constexpr = x_ring.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    STEP: gl.constexpr = 2 if INTERLEAVED else 1
    TO_UP: gl.constexpr = 1 if INTERLEAVED else I
    tasks = sizes[0] * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    experts = load_experts(ids, sizes, SLOTS)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    stage = 0
    phase = 0
    while task < tasks:
        acc, stage, phase = multiply(ring, x_ring, bars, stage, phase, KSTEPS, ACC)
        gate, up = upper_and_lower(acc)
        slot = task // TILES
        finish_slot(
            out_ptr, bias_ptr, gate, up, slot, task % TILES * WIDE, pick_out(experts, slot),
            (TO_UP, STEP), numbers, I, PICKS, FORMULA, GATED, VALID,
        )  # fmt: skip
        task = live_task(task + programs, tasks, experts, programs, TILES)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    x_desc,
    bias_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    R,
    num_mapped,
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
    SLOTS: gl.constexpr,
    TILE: gl.constexpr,
    VALID: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Descriptors of w1 as in ``hopper_decode.up_kernel``, of BOX rows, a divisor of VALID."""
    dtype: gl.constexpr = low_desc.dtype
    TOKENS: gl.constexpr = x_desc.block_shape[0]
    KSTEPS: gl.constexpr = (H + BK - 1) // BK
    WIDE: gl.constexpr = VALID if GATED else 2 * VALID
    TILES: gl.constexpr = (I + WIDE - 1) // WIDE
    rings = (
        gl.allocate_shared_memory(dtype, [STAGES, 2 * TILE, BK], low_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, TOKENS, BK], x_desc.layout),
    )
    bars = open_ring(STAGES, 1)
    ids = (ids_ptr, map_ptr)
    sizes = (R, num_mapped, num_local)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (
                    bias_ptr, out_ptr, rings, bars, ids, sizes, (limit, alpha, beta), I, PICKS,
                    FORMULA, GATED, INTERLEAVED, KSTEPS, TILES, VALID, SLOTS,
                ),
            ),
            (
                up_producer,
                (
                    (low_desc, high_desc, x_desc), rings, bars, ids, sizes, desc_rows, KSTEPS,
                    TILES, VALID, GATED, SLOTS,
                ),
            ),
        ],
        [1],
        [56],
    )  # fmt: skip
