"""The first launch of ``hopper_fp8_prefill``: 8-bit x [T, H], w1 -> act [P, I], position [R]."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.gluon_names import cp_async
from fusedmoe.kernels.triton.hopper_arrivals import await_rows
from fusedmoe.kernels.triton.hopper_common import Scales, Tables, hopper_activation, next_stage
from fusedmoe.kernels.triton.hopper_drawn import (
    announce,
    clear,
    draw,
    let_go,
    open_box,
    post,
    read,
)
from fusedmoe.kernels.triton.hopper_fp8_prefill_common import (
    BY_COLUMN,
    NO_TASK,
    ONE_EACH,
    filled,
    open_ring,
    packed,
    tile_sums,
    unpacked,
)
from fusedmoe.kernels.triton.hopper_fp8_prefill_multiply import BY_ROW, STEP, skip
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    below_of,
    fill_buffer,
    place,
    store_boxes,
    store_tile,
    tiles_of,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_prefill_up import Source, load_step, rows_of_block
from fusedmoe.kernels.triton.quantize import quantized, scale_of

UNSPECIALIZED = (
    "stride_xs", "stride_se", "stride_sn", "scale_shard_step", "scale_row_step", "scale_block",
    "P", "R", "num_local", "desc_rows", "me", "max_polls",
)  # fmt: skip


class Out(NamedTuple):
    """Where act goes: by way of ``buffers``, with a scale for each row and 128 columns (P apart),
    times the inverse of the given one, or as it is (None)."""

    desc: tma.tensor_descriptor
    buffers: gl.shared_memory_descriptor
    scales: gl.tensor | None
    P: gl.tensor


@gluon.jit
def store_rounded(out, act, row, column, rows, CASE: gl.constexpr):
    """act [HALF_M, TILE_N] in 8 bits: with scales OWN to these rows and columns, which are stored,
    or with the given one, whose inverse stands for their pointer. Columns from N on do not
    count."""
    DTYPE: gl.constexpr = out.buffers.dtype
    if CASE.OWN:
        if CASE.N % TILE_N != 0:
            inside = column + gl.arange(0, TILE_N, BY_COLUMN) < CASE.N
            act = gl.where(gl.expand_dims(inside, 0), act, 0.0)
        scale = scale_of(act, 1, DTYPE, CASE.E8M0)
        at = (column // TILE_N).to(gl.int64) * out.P + row
        gl.store(out.scales + at + gl.arange(0, HALF_M, BY_ROW), scale)
        if gl.int8 == DTYPE:
            stored = quantized(act, gl.expand_dims(scale, 1), DTYPE)
        else:
            # Conversion to fp8 saturates.
            stored = (act * gl.expand_dims(1.0 / scale, 1)).to(DTYPE)
    elif gl.int8 == DTYPE:
        stored = quantized(act * out.scales, 1.0, DTYPE)
    else:
        stored = (act * out.scales).to(DTYPE)
    fill_buffer(out.buffers.index(0), stored, 0)
    store_boxes(out.desc, out.buffers.index(0), row, column, rows)


@gluon.jit
def store_act(out, act, row, column, rows, CASE: gl.constexpr):
    if out.scales is not None:
        if column < CASE.N:
            store_rounded(out, act, row, column, rows, CASE)
    else:
        store_tile(out.desc, out.buffers, act, row, column, rows)


@gluon.jit
def up_producer(
    descs, box, counter_ptr, ring, source, x_scales, tables, arrivals, desc_rows,
    CASE: gl.constexpr,
):  # fmt: skip
    """As ``hopper_prefill_up.up_producer``, of bytes; ``x_scales``: a pointer, and from one row's
    to the next one's."""
    H: gl.constexpr = CASE.D
    TILES: gl.constexpr = tiles_of(CASE)
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, layout)), 0)

    blocks = gl.load(tables.num_post) // BLOCK_M
    stage = 0
    phase = 1
    number = 0
    all_here = 0
    task = gl.program_id(0)
    tasks = blocks * TILES
    coming = tasks
    while task < tasks:
        block, tile, expert = place(task, blocks, tables, CASE)
        all_here = await_rows(arrivals, block, all_here, CASE.WORLD)
        n = filled(block, tables)
        rows = rows_of_block(block, tile == 0, source, tables, row, CASE.PICKS)
        slots = gl.load(tables.slots + block * BLOCK_M + gl.arange(0, BLOCK_M, ONE_EACH))
        scaled = (slots >= 0) & (slots < tables.R)
        row_scales = x_scales[0] + (slots // CASE.PICKS).to(gl.int64) * x_scales[1]
        if CASE.STEPPED:
            clear(box, number)
        else:
            row_scale = gl.load(row_scales, scaled, 0.0, cache_modifier=".cg")
            clear(box, number)
            ring.scales.index(number % 2).store(row_scale)
        post(box, number, packed(block, tile, expert, n))
        number += 1
        weight_row = expert * desc_rows + tile * wide_of(CASE)
        for k in range(0, H, STEP):
            if k == H // STEP // 2 * STEP:  # early enough for its latency, as late as can be
                coming = draw(counter_ptr, tables.R)
            mbarrier.wait(ring.empty.index(stage), phase)
            bar = ring.full.index(stage)
            mbarrier.expect(bar, 2 * TILE_N * STEP)
            load_step(ring, stage, descs, weight_row, k, rows, n == 3, column, below_of(CASE), H)
            if CASE.STEPPED:
                cp_async(ring.scales.index(stage), row_scales + k // STEP, scaled)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, CASE.STAGES)
        task = coming
    announce(box, number, NO_TASK)


@gluon.jit
def up_consumer(out, box, bias_ptr, scales, ring, numbers, CASE: gl.constexpr, WHICH: gl.constexpr):
    limit, alpha, beta = numbers
    FORMULA: gl.constexpr = CASE.FORMULA
    if out.scales is not None and not CASE.OWN:
        out = Out(out.desc, out.buffers, 1.0 / gl.load(out.scales), out.P)
    stage = 0
    phase = 0
    turn = 1 - WHICH
    number = 0
    word = read(box, number)
    while word >= 0:
        row, tile, expert, rows = unpacked(word, WHICH)
        row_scale = None
        if not CASE.STEPPED:
            own = ring.scales.index(number % 2).slice(WHICH * HALF_M, HALF_M, 0)
            row_scale = own.load(BY_ROW)
        let_go(box, number)
        column = tile * wide_of(CASE)
        if rows > 0:
            low, high, stage, phase, turn = tile_sums(
                ring, stage, phase, turn, scales, bias_ptr, row_scale, expert, column,
                out.buffers.index(0), CASE, WHICH,
            )  # fmt: skip
            if CASE.GATED:
                act = hopper_activation(FORMULA, low, high, limit, alpha, beta)
                store_act(out, act, row, column, rows, CASE)
            else:
                low = plain_activation(FORMULA, low)
                store_act(out, low, row, column, rows, CASE)
                high = plain_activation(FORMULA, high)
                store_act(out, high, row, column + TILE_N, rows, CASE)
        else:
            stage, phase, turn = skip(ring, stage, phase, turn, CASE, WHICH)
        number += 1
        word = read(box, number)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    low_desc,
    high_desc,
    out_desc,
    bias_ptr,
    x_ptr,
    x_scale_ptr,
    scale_ptr,
    act_scale_ptr,
    position_ptr,
    expert_ids_ptr,
    sorted_ptr,
    num_post_ptr,
    counter_ptr,
    early_ptr,
    flags_ptr,
    state_ptr,
    error_ptr,
    stride_xs,
    stride_se,
    stride_sn,
    scale_shard_step,
    scale_row_step,
    scale_block,
    P,
    R,
    num_local,
    desc_rows,
    me,
    max_polls,
    limit,
    alpha,
    beta,
    CASE: gl.constexpr,
):
    """Descriptors as in ``hopper_prefill_up``. act_scale_ptr: fp32 [I / 128, P], written (OWN), or
    one number, or None where act is 16-bit."""
    ring, out0, out1 = open_ring(low_desc, out_desc, 128, CASE)
    box = open_box(2, gl.int64)
    gdc_wait()
    gdc_launch_dependents()
    tables = Tables(expert_ids_ptr, sorted_ptr, num_post_ptr, R, num_local)
    arrivals = (early_ptr, flags_ptr, state_ptr, error_ptr, me, max_polls)
    H: gl.constexpr = CASE.D
    x_scales = (x_scale_ptr, stride_xs)
    scales = Scales(scale_ptr, stride_se, stride_sn, scale_shard_step, scale_row_step, scale_block)
    first, second = (
        Out(out_desc, out0, act_scale_ptr, P),
        Out(out_desc, out1, act_scale_ptr, P),
    )
    descs = (low_desc, high_desc)
    numbers = (limit, alpha, beta)
    gl.warp_specialize(
        [
            (up_consumer, (first, box, bias_ptr, scales, ring, numbers, CASE, 0)),
            (up_consumer, (second, box, bias_ptr, scales, ring, numbers, CASE, 1)),
            (
                up_producer,
                (
                    descs, box, counter_ptr, ring, Source(x_ptr, H, position_ptr), x_scales,
                    tables, arrivals, desc_rows, CASE,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip
