"""What a step of the packed GEMM adds to its sums where weights are GGUF's superblocks.

As in ``packed_products``; a step is a superblock of 256 columns.
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.quantized_common import spread_groups
from fusedmoe.kernels.triton.sixes import (
    load_six_scales,
    load_sixes,
    six_scales,
    six_values,
    sixes_bf16,
)
from fusedmoe.kernels.triton.superblocks import (
    group_integers,
    one_sixth,
    scales_of_words,
    superblock_columns,
    superblock_numbers,
    superblock_words,
)
from fusedmoe.kernels.triton.threes import (
    load_high_bits,
    load_pairs,
    load_three_factors,
    load_three_scales,
    rounded_twos,
    three_minima,
    three_scales,
    three_values,
)
from fusedmoe.kernels.triton.word_tiles import four_tiles


@triton.jit
def add_superblocks(
    total, w_rows, a_row, live, first, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """total + the products of the 256 columns from ``first`` on; q4_k and q5_k."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    NBYTES: tl.constexpr = 144 if ELEMENT == "q4_k" else 176
    low, high = superblock_numbers(w_rows + first // 256 * NBYTES, ELEMENT, DTYPE, NATIVE)
    low_columns, high_columns = superblock_columns()
    a = tl.load(a_row + (first + low_columns)[None, :], live[:, None], 0.0)
    total = tl.dot(low, tl.trans(a), total, input_precision=PRECISION)
    a = tl.load(a_row + (first + high_columns)[None, :], live[:, None], 0.0)
    return tl.dot(high, tl.trans(a), total, input_precision=PRECISION)


@triton.jit
def _add_tiles(
    total, tiles, a_row, live, first, RUN: tl.constexpr, ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + the products of four tiles of ``sixes``, those 32 * RUN and 32 * RUN + 64 columns
    on."""
    if ORDERED:
        wide = first + tl.arange(0, 128)
        a = tl.load(a_row + (wide + 128 * RUN)[None, :], live[:, None], 0.0)
        value = four_tiles(tiles[0], tiles[1], tiles[2], tiles[3])
        return tl.dot(value, tl.trans(a), total, input_precision=PRECISION)
    else:
        at = tl.arange(0, 32)
        at = first + at // 16 * 128 + at // 2 % 8 * 4 + at % 2
        for tile in tl.static_range(4):
            column = at + (32 * RUN + 64 * (tile // 2) + 2 * (tile % 2))
            a = tl.load(a_row + column[None, :], live[:, None], 0.0)
            total = tl.dot(tiles[tile], tl.trans(a), total, input_precision=PRECISION)
        return total


@triton.jit
def add_sixes(
    total, w_rows, a_row, live, first, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """total + the products of the 256 columns from ``first`` on; q6_k. ORDERED: rows lie tile by
    tile."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    block = w_rows + first // 256 * 212
    near, far, bits, d = load_sixes(block)
    scales = load_six_scales(block, 0), load_six_scales(block, 1)
    for run in tl.static_range(2):
        nibbles = near if run == 0 else far
        if run == 1:
            bits = bits >> 2
        words = sixes_bf16(nibbles, bits) if NATIVE else None
        low, high = six_scales(scales[0], d, run), six_scales(scales[1], d, run)
        tiles = (
            six_values(nibbles, bits, words, low, 0, DTYPE, NATIVE),
            six_values(nibbles, bits, words, low, 1, DTYPE, NATIVE),
            six_values(nibbles, bits, words, high, 2, DTYPE, NATIVE),
            six_values(nibbles, bits, words, high, 3, DTYPE, NATIVE),
        )
        total = _add_tiles(total, tiles, a_row, live, first, run, ORDERED, PRECISION)
    return total


@triton.jit
def add_threes(
    total, w_rows, a_row, live, first, ELEMENT: tl.constexpr, SUMS: tl.constexpr,
    ORDERED: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """total + the products of the 256 columns from ``first`` on; q2_k and q3_k. ORDERED: rows lie
    tile by tile; SUMS: integers and minima of q2_k meet the rows."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    NBYTES: tl.constexpr = 84 if ELEMENT == "q2_k" else 112
    block = w_rows + first // 256 * NBYTES
    pairs = load_pairs(block, ELEMENT)
    high = load_high_bits(block) if ELEMENT == "q3_k" else None
    d, least = load_three_factors(block, ELEMENT)
    scales = load_three_scales(block, 0, ELEMENT), load_three_scales(block, 1, ELEMENT)
    if ELEMENT == "q2_k" and not SUMS:
        for run in tl.static_range(2):
            near = rounded_twos(pairs, scales[0], d, least, run, DTYPE, NATIVE)
            far = rounded_twos(pairs, scales[1], d, least, run + 2, DTYPE, NATIVE)
            tiles = near[0], near[1], far[0], far[1]
            total = _add_tiles(total, tiles, a_row, live, first, run, ORDERED, PRECISION)
        return total
    else:
        part = tl.zeros(total.shape, dtype=tl.float32)
        for run in tl.static_range(2):
            scale = three_scales(scales[0], run, ELEMENT, DTYPE, NATIVE)
            near = three_values(pairs, high, scale, run, ELEMENT, NATIVE)
            scale = three_scales(scales[1], run, ELEMENT, DTYPE, NATIVE)
            far = three_values(pairs, high, scale, run + 2, ELEMENT, NATIVE)
            tiles = near[0], near[1], far[0], far[1]
            part = _add_tiles(part, tiles, a_row, live, first, run, ORDERED, PRECISION)
        total += part * d[:, None]
        if ELEMENT == "q2_k":
            part = tl.zeros(total.shape, dtype=tl.float32)
            for run in tl.static_range(2):
                near = spread_groups(three_minima(scales[0], run, DTYPE, NATIVE), 32)
                far = spread_groups(three_minima(scales[1], run, DTYPE, NATIVE), 32)
                tiles = near, near, far, far
                part = _add_tiles(part, tiles, a_row, live, first, run, ORDERED, PRECISION)
            total -= part * least[:, None]
        return total


@triton.jit
def sum_groups(
    total, w_rows, a_row, live, D, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """total + the products of all columns of q4_k or q5_k, group by group: integers meet the rows,
    scales the sums, so that no weight is rounded. Tensor cores sum the rows too, for the minima."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    NBYTES: tl.constexpr = 144 if ELEMENT == "q4_k" else 176
    OFFSET: tl.constexpr = 128.0 if NATIVE else 0.0
    both, bits, more, most = superblock_words(w_rows)
    for first in range(0, D, 256):
        block = w_rows + first // 256 * NBYTES
        d, least, scales, minima = scales_of_words(both, bits, more, most)
        # After the last superblock it is read again, and not used.
        both, bits, more, most = superblock_words(
            w_rows + tl.minimum(first // 256 + 1, D // 256 - 1) * NBYTES
        )
        at = first + tl.arange(0, 32)
        for chunk in tl.static_range(4):
            low, high, ones = group_integers(block, chunk, ELEMENT, DTYPE, NATIVE)
            a = tl.trans(tl.load(a_row + (at + 64 * chunk)[None, :], live[:, None], 0.0))
            b = tl.trans(tl.load(a_row + (at + 64 * chunk + 32)[None, :], live[:, None], 0.0))
            low_sum = tl.dot(low, a, input_precision=PRECISION)
            low_rows = tl.dot(ones, a, input_precision=PRECISION)
            high_sum = tl.dot(high, b, input_precision=PRECISION)
            high_rows = tl.dot(ones, b, input_precision=PRECISION)
            scale = d * one_sixth(scales, 2 * chunk)
            rest = least * one_sixth(minima, 2 * chunk) + OFFSET * scale
            total += low_sum * scale[:, None]
            total -= low_rows * rest[:, None]
            scale = d * one_sixth(scales, 2 * chunk + 1)
            rest = least * one_sixth(minima, 2 * chunk + 1) + OFFSET * scale
            total += high_sum * scale[:, None]
            total -= high_rows * rest[:, None]
    return total
