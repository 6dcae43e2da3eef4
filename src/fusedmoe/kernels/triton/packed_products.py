"""What a step of the packed GEMM adds to its sums, by the kind of weights it reads.

``w_rows`` are byte pointers of a tile's weight rows [ROWS], ``a_row`` pointers of its slots' rows
[SLOTS, 1], of which ``live`` [SLOTS] count; sums are fp32 [ROWS, SLOTS].
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.quantized_common import (
    float_scale,
    half_scale_bits,
    spread_groups,
    times_bf16,
)
from fusedmoe.kernels.triton.sextets import (
    PAIRS,
    UNIT_COLUMNS,
    load_units,
    sextet_pair,
    sextet_pairs_bf16,
)
from fusedmoe.kernels.triton.word_tiles import bf16_pair, four_tiles, side_by_side


@triton.jit
def _sextets(units, pairs, factor, PAIR: tl.constexpr, ELEMENT: tl.constexpr,
             DTYPE: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Tile PAIR of units times the scales."""
    if NATIVE:
        return times_bf16(bf16_pair(pairs[PAIR]), factor)
    else:
        return sextet_pair(units, PAIR, factor, ELEMENT, DTYPE)


@triton.jit
def add_sextets(
    total, w_rows, scale_rows, a_row, live, first, D, ORDERED: tl.constexpr,
    ELEMENT: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total + the products of DEPTH columns; D is a multiple of 32. ORDERED: of 128, DEPTH is
    128, and rows lie tile by tile."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    WIDTH: tl.constexpr = DEPTH // PAIRS
    words = w_rows.to(tl.pointer_type(tl.int32), bitcast=True)
    units = load_units(words, first, D, WIDTH // 2)
    groups = first // 32 + tl.arange(0, DEPTH // 32)
    scale = tl.load(scale_rows[:, None] + groups[None, :], (groups < D // 32)[None, :], 127)
    if NATIVE:
        # Scales and sum each take half of the exponent that sextet_pairs_bf16 leaves out.
        factor = spread_groups(half_scale_bits(scale), WIDTH).to(tl.bfloat16, bitcast=True)
        pairs = sextet_pairs_bf16(units, ELEMENT)
    else:
        factor = spread_groups(float_scale(scale), WIDTH)
        pairs = None
    if ORDERED:
        value = side_by_side(
            four_tiles(
                _sextets(units, pairs, factor, 0, ELEMENT, DTYPE, NATIVE),
                _sextets(units, pairs, factor, 1, ELEMENT, DTYPE, NATIVE),
                _sextets(units, pairs, factor, 2, ELEMENT, DTYPE, NATIVE),
                _sextets(units, pairs, factor, 3, ELEMENT, DTYPE, NATIVE),
            ),
            four_tiles(
                _sextets(units, pairs, factor, 4, ELEMENT, DTYPE, NATIVE),
                _sextets(units, pairs, factor, 5, ELEMENT, DTYPE, NATIVE),
                _sextets(units, pairs, factor, 6, ELEMENT, DTYPE, NATIVE),
                _sextets(units, pairs, factor, 7, ELEMENT, DTYPE, NATIVE),
            ),
        )
        a = tl.load(a_row + (first + tl.arange(0, DEPTH))[None, :], live[:, None], 0.0)
        return tl.dot(value, tl.trans(a), total, input_precision=PRECISION)
    else:
        at = tl.arange(0, WIDTH)
        at = first + at // 2 * UNIT_COLUMNS + at % 2
        inside = live[:, None] & (at < D)[None, :]
        for pair in tl.static_range(PAIRS):
            numbers = _sextets(units, pairs, factor, pair, ELEMENT, DTYPE, NATIVE)
            a = tl.load(a_row + (at + 2 * pair)[None, :], inside, 0.0)
            total = tl.dot(numbers, tl.trans(a), total, input_precision=PRECISION)
        return total


@triton.jit
def _by_group(number, column, index_rows, scale_rows, zero_rows, shard, groups, D, inside,
              MIDDLE: tl.constexpr, DTYPE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Integers [ROWS, W] of the columns [W], less the zero point and times the scale of their
    groups."""
    last = (groups - 1).to(tl.uint32)
    group = tl.load(index_rows + column, inside, 0)
    group = tl.minimum(group.to(tl.uint32, bitcast=True), last)[None, :]
    if GATED:
        other = tl.load(index_rows + D + column, inside, 0)
        other = tl.minimum(other.to(tl.uint32, bitcast=True), last)[None, :]
        group = tl.where((shard == 0)[:, None], group, other)
    number = number.to(tl.float32)
    if zero_rows is None:
        number -= MIDDLE
    else:
        number -= tl.load(zero_rows[:, None] + group).to(tl.float32)
    return (number * tl.load(scale_rows[:, None] + group).to(tl.float32)).to(DTYPE)


@triton.jit
def add_ordered(
    total, w_rows, scale_rows, zero_rows, index_rows, a_row, live, shard, first, groups, D,
    ELEMENT: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total + the products of DEPTH columns, each of which has its group in a table."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    if ELEMENT == "int4":
        at = tl.arange(0, DEPTH // 2)
        inside = at < (D - first) // 2
        packed = tl.load(w_rows[:, None] + (first // 2 + at)[None, :], inside[None, :], 0)
        low = _by_group(
            (packed & 15), first + 2 * at, index_rows, scale_rows, zero_rows, shard, groups, D,
            inside, 8, DTYPE, GATED,
        )  # fmt: skip
        high = _by_group(
            (packed >> 4), first + 2 * at + 1, index_rows, scale_rows, zero_rows, shard, groups, D,
            inside, 8, DTYPE, GATED,
        )  # fmt: skip
        wide = tl.arange(0, DEPTH)
        mask = live[:, None] & (wide < D - first)[None, :]
        a = tl.load(a_row + (first + wide)[None, :], mask, 0.0)
        even, odd = tl.split(tl.reshape(a, (a.shape[0], DEPTH // 2, 2)))
        total = tl.dot(low, tl.trans(even), total, input_precision=PRECISION)
        return tl.dot(high, tl.trans(odd), total, input_precision=PRECISION)
    else:
        at = tl.arange(0, DEPTH)
        inside = at < D - first
        packed = tl.load(w_rows[:, None] + (first + at)[None, :], inside[None, :], 0)
        value = _by_group(
            packed, first + at, index_rows, scale_rows, zero_rows, shard, groups, D, inside, 0,
            DTYPE, GATED,
        )  # fmt: skip
        a = tl.load(a_row + (first + at)[None, :], live[:, None] & inside[None, :], 0.0)
        return tl.dot(value, tl.trans(a), total, input_precision=PRECISION)
