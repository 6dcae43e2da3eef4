"""What multiplies in both kernels of ``hopper_prefill``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import expert_at, hopper_activation
from fusedmoe.kernels.triton.hopper_prefill_common import (
    BLOCK_M,
    HALF_M,
    TILE_N,
    below_of,
    halves,
    hear_half,
    load_bias,
    multiply,
    store_tile,
    tiles_of,
    wide_of,
)
from fusedmoe.kernels.triton.hopper_pushed import lines_of, push_tile, slots_of_half


@gluon.jit
def consumer(
    out_desc, buffers, box, bias_ptr, ring, tables, numbers, push, CASE: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """The products of half a block: with the bias, through the activation (if any) of ``numbers``
    (limit, alpha, beta), to ``out_desc`` or, unless its first is None, where ``push`` says, as
    ``hopper_pushed.lines_of`` takes it."""
    TILES: gl.constexpr = tiles_of(CASE)
    BK: gl.constexpr = ring.rows.shape[2]
    KSTEPS: gl.constexpr = (CASE.D + BK - 1) // BK
    FORMULA: gl.constexpr = CASE.FORMULA
    blocks = gl.load(tables.num_post) // BLOCK_M
    stage = 0
    phase = 0
    number = 0
    at, live = hear_half(box, number, WHICH)
    while at < blocks * TILES:
        block, tile = at // TILES, at % TILES
        row = block * BLOCK_M + WHICH * HALF_M
        if push[0] is not None:
            slots = slots_of_half(tables.slots, row)
        acc, stage, phase = multiply(ring, stage, phase, live, KSTEPS, WHICH)
        if live:
            low, high = halves(acc)
            column = tile * wide_of(CASE)
            if bias_ptr is not None:
                STEP: gl.constexpr = 2 if CASE.INTERLEAVED else 1
                TO_UP: gl.constexpr = 1 if CASE.INTERLEAVED else CASE.N
                TO_HIGH: gl.constexpr = TO_UP if CASE.GATED else TILE_N
                expert = expert_at(tables.experts, block, tables.num_local).to(gl.int64)
                bias = bias_ptr + expert * (2 * CASE.N if CASE.GATED else CASE.N) + column * STEP
                low += load_bias(bias, STEP, CASE.N - column)
                high += load_bias(bias + TO_HIGH, STEP, CASE.N - column - below_of(CASE))
            if CASE.GATED:
                limit, alpha, beta = numbers
                act = hopper_activation(FORMULA, low, high, limit, alpha, beta)
                store_tile(out_desc, buffers, act, row, column)
            else:
                if FORMULA != "":
                    low = plain_activation(FORMULA, low)
                    high = plain_activation(FORMULA, high)
                if push[0] is None:
                    store_tile(out_desc, buffers, low, row, column)
                    store_tile(out_desc, buffers, high, row, column + TILE_N)
                else:
                    lines, there = lines_of(push, slots, tables.R, CASE.N, buffers.dtype)
                    push_tile(lines, there, buffers, low, column, CASE.N)
                    push_tile(lines, there, buffers, high, column + TILE_N, CASE.N)
        number += 1
        at, live = hear_half(box, number, WHICH)
    tma.store_wait(0)
