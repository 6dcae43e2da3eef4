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
    tiles_of,
    upper_and_lower,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_direct_common import (
    UNSPECIALIZED,
    Picks,
    bytes_of,
    live_task,
    load_experts,
    multiply,
    open_ring,
    pick_out,
)


@gluon.jit
def up_producer(descs, rings, bars, picks, desc_rows, CASE: gl.constexpr):
    """Fill the rings: (weights, rows of x) by (low, high, x), or weights alone."""
    low_desc, high_desc = descs[0], descs[1]
    ring = rings[0]
    full, empty = bars
    BK: gl.constexpr = ring.shape[2]
    KSTEPS: gl.constexpr = (CASE.D + BK - 1) // BK
    TILES: gl.constexpr = tiles_of(CASE)
    BOX: gl.constexpr = low_desc.block_shape[0]
    BELOW: gl.constexpr = 0 if CASE.GATED else CASE.VALID
    BYTES: gl.constexpr = BK * bytes_of(ring.dtype)
    X_ROWS: gl.constexpr = rings[1].shape[1] if len(rings) == 2 else 0
    tasks = picks.R * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    gdc_launch_dependents()
    experts = load_experts(picks, CASE)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    stage = 0
    phase = 1
    while task < tasks:
        row = pick_out(experts, task // TILES) * desc_rows + task % TILES * wide_of(CASE)
        for k in range(KSTEPS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (2 * CASE.VALID + X_ROWS) * BYTES)
            for i in gl.static_range(CASE.VALID // BOX):
                low = ring.index(stage).slice(i * BOX, BOX, 0)
                high = ring.index(stage).slice(CASE.ROWS // 2 + i * BOX, BOX, 0)
                at = row + i * BOX
                tma_load(low_desc, [at, k * BK], bar, low)
                tma_load(high_desc, [at + BELOW, k * BK], bar, high)
            if len(rings) == 2:
                x_stage = rings[1].index(stage)
                tma_load(descs[2], [0, k * BK], bar, x_stage)
            stage, phase = next_stage(stage, phase, CASE.STAGES)
        task = live_task(task + programs, tasks, experts, programs, TILES)


@gluon.jit
def store_token(out_ptr, value, token, column, CASE: gl.constexpr):
    """out[column + m] = value[m, token] for m < VALID."""
    layout: gl.constexpr = value.type.layout
    m = gl.expand_dims(gl.arange(0, value.shape[0], gl.SliceLayout(1, layout)), 1)
    n = gl.expand_dims(gl.arange(0, value.shape[1], gl.SliceLayout(0, layout)), 0)
    inside = (n == token) & (m < CASE.VALID) & (column + m < CASE.N)
    gl.store(out_ptr + column + m + 0 * n, value.to(out_ptr.dtype.element_ty), inside)


@gluon.jit
def finish_slot(
    out_ptr, bias_ptr, gate, up, slot, column, expert, bias_steps, numbers, CASE: gl.constexpr
):
    """Biases, activation and store of a slot's features from ``column`` on: both halves of a
    tile's rows.

    bias_steps: (from gate to up, from feature to feature); numbers: (limit, alpha, beta).
    """
    FORMULA: gl.constexpr = CASE.FORMULA
    if bias_ptr is not None:
        TILE: gl.constexpr = gate.shape[0]
        layout: gl.constexpr = gate.type.layout
        STRIDE: gl.constexpr = 2 * CASE.N if CASE.GATED else CASE.N
        BELOW: gl.constexpr = 0 if CASE.GATED else CASE.VALID
        at = bias_ptr + expert.to(gl.int64) * STRIDE + column * bias_steps[1]
        to_up = bias_steps[0] if CASE.GATED else CASE.VALID * bias_steps[1]
        gate += load_bias(at, bias_steps[1], CASE.N - column, TILE, layout)
        up += load_bias(at + to_up, bias_steps[1], CASE.N - column - BELOW, TILE, layout)
    out = out_ptr + slot * CASE.N
    token = slot // CASE.PICKS
    if CASE.GATED:
        act = hopper_activation(FORMULA, gate, up, numbers[0], numbers[1], numbers[2])
        store_token(out, act, token, column, CASE)
    else:
        store_token(out, plain_activation(FORMULA, gate), token, column, CASE)
        store_token(out, plain_activation(FORMULA, up), token, column + CASE.VALID, CASE)


@gluon.jit
def up_consumer(bias_ptr, out_ptr, rings, bars, picks, numbers, CASE: gl.constexpr):
    ring, x_ring = rings
    BK: gl.constexpr = ring.shape[2]
    KSTEPS: gl.constexpr = (CASE.D + BK - 1) // BK
    TILES: gl.constexpr = tiles_of(CASE)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x_ring.shape[1], 16])
    STEP: gl.constexpr = 2 if CASE.INTERLEAVED else 1
    TO_UP: gl.constexpr = 1 if CASE.INTERLEAVED else CASE.N
    tasks = picks.R * TILES
    programs = gl.num_programs(0)

    gdc_wait()
    experts = load_experts(picks, CASE)
    task = live_task(gl.program_id(0), tasks, experts, programs, TILES)
    stage = 0
    phase = 0
    while task < tasks:
        acc, stage, phase = multiply(ring, x_ring, bars, stage, phase, KSTEPS, ACC)
        gate, up = upper_and_lower(acc)
        slot = task // TILES
        finish_slot(
            out_ptr, bias_ptr, gate, up, slot, task % TILES * wide_of(CASE),
            pick_out(experts, slot), (TO_UP, STEP), numbers, CASE,
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
    CASE: gl.constexpr,
):
    """Descriptors of w1 as in ``hopper_decode.up_kernel``, of BOX rows, a divisor of VALID."""
    dtype: gl.constexpr = low_desc.dtype
    TOKENS: gl.constexpr = x_desc.block_shape[0]
    BK: gl.constexpr = x_desc.block_shape[1]
    rings = (
        gl.allocate_shared_memory(dtype, [CASE.STAGES, CASE.ROWS, BK], low_desc.layout),
        gl.allocate_shared_memory(dtype, [CASE.STAGES, TOKENS, BK], x_desc.layout),
    )
    bars = open_ring(CASE.STAGES, 1)
    picks = Picks(ids_ptr, map_ptr, R, num_mapped, num_local)
    descs = (low_desc, high_desc, x_desc)
    numbers = (limit, alpha, beta)
    gl.warp_specialize(
        [
            (up_consumer, (bias_ptr, out_ptr, rings, bars, picks, numbers, CASE)),
            (up_producer, (descs, rings, bars, picks, desc_rows, CASE)),
        ],
        [1],
        [56],
    )
