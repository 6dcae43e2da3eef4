"""GGUF's blocks of 32 columns with a minimum (q4_1, q5_1) as numbers in registers.

The layout is that of ``quantization/formats/superblocks.py``: five or six words for a block, of
which the last four hold four columns of its first half each, in low nibbles, and four of the
second one.

A tile [ROWS, 8 * BLOCKS] of numbers has two columns of each of four words: columns 4 i and 4 i + 1
of the first halves, or the two behind them, or likewise of the second halves.
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.quantized_common import spread_groups
from fusedmoe.kernels.triton.word_tiles import beside, bytes_of_words, four_tiles


@triton.jit
def _spread_bits(words):
    """The four lowest bits of words, one in each byte at the fifth bit."""
    return ((words & 15) * 0x00204081 & 0x01010101) << 4


@triton.jit
def _block_words(rows, first, D, ELEMENT: tl.constexpr, BLOCKS: tl.constexpr):
    """Of the blocks from column ``first`` on at ``rows``, word pointers [ROWS]: d and m, words
    [ROWS, BLOCKS], and the low and the high integers, a byte for each, words [ROWS, 4 * BLOCKS].
    Zeros past the end."""
    WORDS: tl.constexpr = 5 if ELEMENT == "q4_1" else 6
    block = first // 32 + tl.arange(0, BLOCKS)
    inside = (block < D // 32)[None, :]
    ptrs = rows[:, None] + (block * WORDS)[None, :]
    both = tl.load(ptrs, inside, 0)
    at = tl.arange(0, 4 * BLOCKS)
    block = first // 32 + at // 4
    packed = tl.load(
        rows[:, None] + (block * WORDS + WORDS - 4 + at % 4)[None, :],
        (block < D // 32)[None, :],
        0,
    )
    low, high = packed & 0x0F0F0F0F, (packed >> 4) & 0x0F0F0F0F
    if ELEMENT == "q5_1":
        bits = tl.load(ptrs + 1, inside, 0)
        # Four bits of each word in turn, and those of the second half above them.
        bits = beside(beside(bits, bits >> 8), beside(bits >> 4, bits >> 12))
        low, high = low | _spread_bits(bits), high | _spread_bits(bits >> 16)
    return both, low, high


@triton.jit
def _values(words, d, rest, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Both tiles of words of integers, with the scale and what is subtracted of each column."""
    first, second = bytes_of_words(words, NATIVE)
    return (first.to(tl.float32) * d - rest).to(DTYPE), (second.to(tl.float32) * d - rest).to(DTYPE)


@triton.jit
def add_minimum_blocks(
    total, w_rows, a_row, live, first, D, ORDERED: tl.constexpr, ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr, NATIVE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total + the products of DEPTH columns; D is a multiple of 32. ORDERED: of 128, DEPTH is 128,
    and rows lie tile by tile."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    BLOCKS: tl.constexpr = DEPTH // 32
    WIDTH: tl.constexpr = DEPTH // 4
    OFFSET: tl.constexpr = 128.0 if NATIVE else 0.0
    rows = w_rows.to(tl.pointer_type(tl.int32), bitcast=True)
    both, low, high = _block_words(rows, first, D, ELEMENT, BLOCKS)
    d = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    least = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    rest = spread_groups(OFFSET * d - least, WIDTH)
    d = spread_groups(d, WIDTH)
    near, far = _values(low, d, rest, DTYPE, NATIVE), _values(high, d, rest, DTYPE, NATIVE)
    if ORDERED:
        a = tl.load(a_row + (first + tl.arange(0, DEPTH))[None, :], live[:, None], 0.0)
        value = four_tiles(near[0], near[1], far[0], far[1])
        return tl.dot(value, tl.trans(a), total, input_precision=PRECISION)
    else:
        tiles = near[0], near[1], far[0], far[1]
        at = tl.arange(0, WIDTH)
        at = first + at // 8 * 32 + at // 2 % 4 * 4 + at % 2
        inside = live[:, None] & (at < D)[None, :]
        for tile in tl.static_range(4):
            column = at + (16 * (tile // 2) + 2 * (tile % 2))
            a = tl.load(a_row + column[None, :], inside, 0.0)
            total = tl.dot(tiles[tile], tl.trans(a), total, input_precision=PRECISION)
        return total
