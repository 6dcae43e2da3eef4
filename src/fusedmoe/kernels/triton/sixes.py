"""GGUF's superblocks of six-bit integers (q6_k) as numbers in registers.

The layout is that of ``quantization/formats/superblocks.py``: of a half of 128 columns, a word of
bits has two for sixteen columns, four apart by 32 each; a word of nibbles has the others of four
and of the four 64 columns on.

A tile [ROWS, 32] of numbers has two columns of each of eight words in both halves: columns 4 i and
4 i + 1, or the two behind them, and what is 32, 64 or 96 columns on.
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.quantized_common import (
    minus_bf16,
    spread_groups,
    times_terms_bf16,
    two_terms_bf16,
    wider_nibbles_asm,
)
from fusedmoe.kernels.triton.word_tiles import beside, bf16_pair


@triton.jit
def load_sixes(block):
    """(nibbles, those 32 columns on, bits) of superblocks at ``block``, words [ROWS, 16], eight of
    each half; and the scale of all, fp32 [ROWS]."""
    at = tl.arange(0, 16)
    half, at = at // 8, at % 8
    words = block.to(tl.pointer_type(tl.int32), bitcast=True)[:, None]
    d = tl.load((block + 208).to(tl.pointer_type(tl.float16), bitcast=True)).to(tl.float32)
    return (
        tl.load(words + (16 * half + at)[None, :]),
        tl.load(words + (16 * half + at + 8)[None, :]),
        tl.load(words + (32 + 8 * half + at)[None, :]),
        d,
    )


@triton.jit
def load_six_scales(block, PAIR: tl.constexpr):
    """Four int8 each, of the groups in the tiles 64 * PAIR and 64 * PAIR + 32 columns on in both
    halves, words [ROWS, 2]."""
    words = (block + (192 + 4 * PAIR)).to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words[:, None] + (2 * tl.arange(0, 2))[None, :])


@triton.jit
def six_scales(words, d, RUN: tl.constexpr):
    """The scales of the groups in the tiles 32 * RUN columns on, fp32 [ROWS, 4], of the words of
    their pair."""
    first = words << (24 - 16 * (RUN % 2)) >> 24
    return beside(first, words << (16 - 16 * (RUN % 2)) >> 24).to(tl.float32) * d[:, None]


_SIXES_ASM = tl.constexpr(
    wider_nibbles_asm(
        """shl.b32 t, $5, 4;
        lop3.b32 a, t, 0x30303030, a, 0xEA;
        lop3.b32 b, $5, 0x30303030, b, 0xEA;"""
    )
)


@triton.jit
def sixes_bf16(nibbles, bits):
    """Four tiles of integers, plus 128, two numbers of bf16 in a word: of the low nibbles with the
    lowest two bits of bytes, then of the high ones with the two from the fifth on."""
    return tl.inline_asm_elementwise(
        _SIXES_ASM,
        "=r,=r,=r,=r,r,r",
        [nibbles, bits],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _six(nibbles, bits, SHIFT: tl.constexpr):
    """The integer of one of four columns of words, less its middle, fp32."""
    return (((nibbles >> SHIFT) & 15 | ((bits >> SHIFT) & 3) << 4) - 32).to(tl.float32)


@triton.jit
def six_values(
    nibbles, bits, words, scale, TILE: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr
):
    """Tile TILE of four [ROWS, 32], times the scales of its groups; NATIVE: of ``words``, which
    ``sixes_bf16`` made."""
    if NATIVE:
        number = bf16_pair(words[TILE])
        number = minus_bf16(number, tl.full(number.shape, 160.0, tl.bfloat16))
        more, less = two_terms_bf16(scale)
        return times_terms_bf16(number, spread_groups(more, 32), spread_groups(less, 32))
    else:
        SHIFT: tl.constexpr = 16 * (TILE % 2) + 4 * (TILE // 2)
        number = beside(_six(nibbles, bits, SHIFT), _six(nibbles, bits, SHIFT + 8))
        return (number * spread_groups(scale, 32)).to(DTYPE)
