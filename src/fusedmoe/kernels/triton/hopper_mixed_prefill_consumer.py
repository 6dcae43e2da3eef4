"""What multiplies in both kernels of ``hopper_mixed_prefill``, and the warps of a program."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from fusedmoe.kernels.triton.activation import plain_activation
from fusedmoe.kernels.triton.hopper_common import Tables, hopper_activation
from fusedmoe.kernels.triton.hopper_drawn import hear
from fusedmoe.kernels.triton.hopper_mixed_multiply import multiply, rows_of
from fusedmoe.kernels.triton.hopper_mixed_prefill_common import (
    Ring,
    blocks_of,
    expert_of,
    finished,
    first_of,
    number_of_kinds,
    rest_of,
    store_side,
    tiles_of,
)
from fusedmoe.kernels.triton.hopper_mixed_scales import Weights, group_pointers


class Common(NamedTuple):
    """What all consumers share; ``numbers`` are the activation's (limit, alpha, beta)."""

    out_desc: tma.tensor_descriptor
    box: tuple
    ring: Ring
    weights: Weights
    tables: Tables
    numbers: tuple


@gluon.jit
def finish_product(
    common, buffers, acc, expert, row, tile, PART: gl.constexpr, CASE: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """Scales, biases, activation (if any) and store of one product's sums, or a part of them."""
    out_desc = common.out_desc
    FORMULA: gl.constexpr = CASE.FORMULA
    ORDERED: gl.constexpr = CASE.ORDERED
    first = rows_of(tile, WHICH, CASE.ROWS, CASE.GATED)
    low, high = finished(acc, common.weights, expert, first, CASE)
    if CASE.GATED:
        limit, alpha, beta = common.numbers
        act = hopper_activation(FORMULA, low, high, limit, alpha, beta)
        store_side(out_desc, buffers, act, row, first[0], PART, ORDERED)
    else:
        if FORMULA != "":
            low = plain_activation(FORMULA, low)
        store_side(out_desc, buffers, low, row, first[0], 0, ORDERED)
        if FORMULA != "":
            high = plain_activation(FORMULA, high)
        store_side(out_desc, buffers, high, row, first[1], 1, ORDERED)


@gluon.jit
def tile_product(
    common, buffers, stage, phase, expert, row, tile, KIND: gl.constexpr, CASE: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """Product number WHICH of a tile, of a block's places from ``row`` on; KIND is a number."""
    FIRST: gl.constexpr = first_of(CASE.SLOTS, KIND)
    REST: gl.constexpr = rest_of(CASE.SLOTS, KIND)
    first = rows_of(tile, WHICH, CASE.ROWS, CASE.GATED)
    pointers = group_pointers(common.weights, expert, first, CASE)
    sums, stage, phase = multiply(common.ring, stage, phase, pointers, FIRST, REST, WHICH, CASE)
    tma.store_wait(0)  # what the tile before stored has left its buffers long ago
    for part in gl.static_range(len(sums)):
        at = row + part * FIRST
        finish_product(common, buffers, sums[part], expert, at, tile, part, CASE, WHICH)
    return stage, phase


@gluon.jit
def consumer(common, buffers, CASE: gl.constexpr, WHICH: gl.constexpr):
    """Product number WHICH of every tile."""
    TILES: gl.constexpr = tiles_of(CASE)
    first_block, blocks = blocks_of(common.tables, CASE)
    stage = 0
    phase = 0
    number = 0
    word = hear(common.box, number)
    while word // 4 < blocks * TILES:
        block, tile = first_block + word // 4 // TILES, word // 4 % TILES
        expert = expert_of(common.tables, block, CASE)
        row = block * CASE.SLOTS
        if word % 4 == 0:
            stage, phase = tile_product(
                common, buffers, stage, phase, expert, row, tile, 0, CASE, WHICH
            )
        elif number_of_kinds(CASE.SLOTS) == 2 or word % 4 == 1:
            stage, phase = tile_product(
                common, buffers, stage, phase, expert, row, tile, 1, CASE, WHICH
            )
        else:
            stage, phase = tile_product(
                common, buffers, stage, phase, expert, row, tile, 2, CASE, WHICH
            )
        number += 1
        word = hear(common.box, number)
    tma.store_wait(0)


@gluon.jit
def produce(producer: gl.constexpr, given, CASE: gl.constexpr):
    """A function that was given does not begin a warp."""
    producer(*given, CASE)


@gluon.jit
def run_warps(common, out, producer: gl.constexpr, given, WARPS: gl.constexpr, CASE: gl.constexpr):
    """Run a consumer for every 64 rows of weights, and the producer on WARPS warps."""
    if CASE.ROWS == 128:
        gl.warp_specialize(
            [
                (consumer, (common, out[0], CASE, 0)),
                (consumer, (common, out[1], CASE, 1)),
                (produce, (producer, given, CASE)),
            ],
            [4, WARPS],
            [216, 72],
        )
    elif CASE.ROWS == 192:
        gl.warp_specialize(
            [
                (consumer, (common, out[0], CASE, 0)),
                (consumer, (common, out[1], CASE, 1)),
                (consumer, (common, out[2], CASE, 2)),
                (produce, (producer, given, CASE)),
            ],
            [4, 4, WARPS],
            [144, 144, 80],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (common, out[0], CASE, 0)),
                (consumer, (common, out[1], CASE, 1)),
                (consumer, (common, out[2], CASE, 2)),
                (consumer, (common, out[3], CASE, 3)),
                (produce, (producer, given, CASE)),
            ],
            [4, 4, 4, WARPS],
            [104, 104, 104, 64],
        )
