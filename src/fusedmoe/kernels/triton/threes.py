"""GGUF's superblocks of integers of two and three bits (q2_k, q3_k) as integers in registers.

The layout is that of ``quantization/formats/superblocks.py``: of a half of 128 columns, a word of
bit pairs has four columns, and those 32, 64 and 96 columns on; a word of q3_k's high bits has these
of both halves.

A tile [ROWS, 32] has two columns of each of eight words in both halves, as those of ``sixes``:
columns 4 i and 4 i + 1, or the two behind them, and what is 32, 64 or 96 columns on. An integer
times that of its group's scale is 128 at most, which floats of 16 bits hold: what all groups of a
superblock share meets the sums, and no weight is rounded. Minima take products of their own, so
where these have many slots, numbers of q2_k are made first, and rounded once (``rounded_twos``).
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.quantized_common import minus_bf16, spread_groups, times_bf16
from fusedmoe.kernels.triton.word_tiles import beside, bytes_of_words, side_by_side


@triton.jit
def load_pairs(block, ELEMENT: tl.constexpr):
    """The bit pairs of superblocks at ``block``, words [ROWS, 16], eight of each half."""
    FIRST: tl.constexpr = 4 if ELEMENT == "q2_k" else 8
    words = block.to(tl.pointer_type(tl.int32), bitcast=True)[:, None]
    return tl.load(words + (FIRST + tl.arange(0, 16))[None, :])


@triton.jit
def load_high_bits(block):
    """Those of q3_k, four from the third of each byte on, for the words of ``load_pairs``."""
    words = block.to(tl.pointer_type(tl.int32), bitcast=True)[:, None]
    both = tl.load(words + tl.arange(0, 8)[None, :])
    return side_by_side((both << 2) & 0x3C3C3C3C, (both >> 2) & 0x3C3C3C3C)


@triton.jit
def load_three_scales(block, PAIR: tl.constexpr, ELEMENT: tl.constexpr):
    """Four bytes each, of the groups in the tiles 64 * PAIR and 64 * PAIR + 32 columns on in both
    halves, words [ROWS, 2]: scales of six bits; of q2_k a nibble of scale and one of minimum."""
    words = block.to(tl.pointer_type(tl.int32), bitcast=True)
    if ELEMENT == "q2_k":
        return tl.load(words[:, None] + (PAIR + 2 * tl.arange(0, 2))[None, :])
    else:
        half = tl.arange(0, 2)[None, :]
        low = tl.load(words + (24 + PAIR))[:, None] >> (4 * half)
        high = tl.load(words + 26)[:, None] >> (4 * half + 2 * PAIR)
        return (low & 0x0F0F0F0F) | (high & 0x03030303) << 4


@triton.jit
def load_three_factors(block, ELEMENT: tl.constexpr):
    """What multiplies all scales, and what all minima, fp32 [ROWS]; q3_k has padding there."""
    words = block.to(tl.pointer_type(tl.int32), bitcast=True)
    both = tl.load(words + (20 if ELEMENT == "q2_k" else 27))
    d = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return d, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _as_float(integer, MIDDLE: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Integers below 128, less MIDDLE; NATIVE: as the mantissas of bf16 from 128 to 255."""
    if NATIVE:
        number = (integer | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return minus_bf16(number, tl.full(number.shape, 128.0 + MIDDLE, tl.bfloat16))
    else:
        return (integer - MIDDLE).to(DTYPE)


@triton.jit
def three_scales(
    words, RUN: tl.constexpr, ELEMENT: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr
):
    """The scales of the groups in the tiles 32 * RUN columns on, [ROWS, 4] in DTYPE, of the words
    of their pair."""
    SHIFT: tl.constexpr = 16 * (RUN % 2)
    each = beside(words >> SHIFT, words >> (SHIFT + 8))
    if ELEMENT == "q2_k":
        return _as_float(each & 15, 0, DTYPE, NATIVE)
    else:
        return _as_float(each & 63, 32, DTYPE, NATIVE)


@triton.jit
def three_minima(words, RUN: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """The minima of q2_k likewise."""
    SHIFT: tl.constexpr = 16 * (RUN % 2) + 4
    each = beside(words >> SHIFT, words >> (SHIFT + 8))
    return _as_float(each & 15, 0, DTYPE, NATIVE)


@triton.jit
def _integers(pairs, high, RUN: tl.constexpr, NATIVE: tl.constexpr):
    """Both tiles 32 * RUN columns on; NATIVE: in bf16, and 128 more."""
    words = (pairs >> (2 * RUN)) & 0x03030303
    if high is not None:
        words = words | (high >> RUN) & 0x04040404
    return bytes_of_words(words, NATIVE)


@triton.jit
def _times(number, scale, MIDDLE: tl.constexpr, NATIVE: tl.constexpr):
    """A tile of integers, less MIDDLE, times the scales of their groups [ROWS, 4]; NATIVE: of
    integers and 128 more."""
    scale = spread_groups(scale, 32)
    if NATIVE:
        middle = tl.full(number.shape, 128.0 + MIDDLE, tl.bfloat16)
        return times_bf16(minus_bf16(number, middle), scale)
    else:
        return (number - MIDDLE).to(scale.dtype) * scale


@triton.jit
def three_values(
    pairs, high, scale, RUN: tl.constexpr, ELEMENT: tl.constexpr, NATIVE: tl.constexpr
):
    """Both tiles 32 * RUN columns on, times the scales of their groups [ROWS, 4]: exact."""
    MIDDLE: tl.constexpr = 0 if ELEMENT == "q2_k" else 4
    first, second = _integers(pairs, high, RUN, NATIVE)
    return _times(first, scale, MIDDLE, NATIVE), _times(second, scale, MIDDLE, NATIVE)


@triton.jit
def _rounded(number, scale, rest, DTYPE: tl.constexpr):
    return (number.to(tl.float32) * spread_groups(scale, 32) - spread_groups(rest, 32)).to(DTYPE)


@triton.jit
def rounded_twos(
    pairs, words, d, least, RUN: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr
):
    """Both tiles 32 * RUN columns on as the numbers that they are, ``words`` of their scales."""
    OFFSET: tl.constexpr = 128.0 if NATIVE else 0.0
    scale = three_scales(words, RUN, "q2_k", tl.float32, False) * d[:, None]
    rest = three_minima(words, RUN, tl.float32, False) * least[:, None] + OFFSET * scale
    first, second = _integers(pairs, None, RUN, NATIVE)
    return _rounded(first, scale, rest, DTYPE), _rounded(second, scale, rest, DTYPE)
