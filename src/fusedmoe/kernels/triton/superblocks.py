"""GGUF's superblocks with minima (q4_k, q5_k) as numbers in registers, 256 columns at a time.

The layouts are those of ``quantization/formats/superblocks.py``. Byte p of a superblock's 128 bytes
of nibbles holds a column of the low plane and one of the high plane: two products of 128 columns,
without an interleaving. A group's columns lie together in a plane.

Where the GPU has packed bf16 arithmetic, an integer becomes the mantissa of a number from 128 to
255, and what that adds is subtracted with the minima, or from the number, exactly.
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.quantized_common import (
    int4_nibbles_bf16,
    spread_groups,
    wider_nibbles_asm,
)


@triton.jit
def superblock_columns():
    """The columns of the low and of the high plane, [128] each, by the place of their byte."""
    at = tl.arange(0, 128)
    low = at // 32 * 64 + at % 32
    return low, low + 32


@triton.jit
def _sixths(words, ODD: tl.constexpr):
    """Four of eight numbers of six bits, those of even or odd place, fp32 [ROWS, 4]; ``words``
    [ROWS] twice hold four each, a byte for one."""
    at = tl.arange(0, 4)[None, :]
    word = tl.where(at < 2, words[0][:, None], words[1][:, None])
    return ((word >> (at % 2 * 16 + 8 * ODD)) & 63).to(tl.float32)


@triton.jit
def superblock_words(block):
    """The first sixteen bytes of superblocks of q4_k or q5_k, int32 [ROWS] four times."""
    words = block.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)


@triton.jit
def scales_of_words(both, first, second, third):
    """Of ``superblock_words``: (scale, minimum) of all, fp32 [ROWS], and the six bits of the
    groups' scales and of their minima, pairs of [ROWS]: the groups 0 to 3, and 4 to 7."""
    d = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    least = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    more_scales = (third & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)
    more_minima = ((third >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030)
    scales, minima = (first & 0x3F3F3F3F, more_scales), (second & 0x3F3F3F3F, more_minima)
    return d, least, scales, minima


@triton.jit
def one_sixth(words, GROUP: tl.constexpr):
    """The six bits of a group among eight, fp32 [ROWS]."""
    return ((words[GROUP // 4] >> (8 * (GROUP % 4))) & 63).to(tl.float32)


@triton.jit
def _scales_and_minima(block):
    """(scale, minimum) of the low plane's groups, then of the high one's, fp32 [ROWS, 4] each."""
    both, first, second, third = superblock_words(block)
    d, least, scales, minima = scales_of_words(both, first, second, third)
    d, least = d[:, None], least[:, None]
    return (
        d * _sixths(scales, 0),
        least * _sixths(minima, 0),
        d * _sixths(scales, 1),
        least * _sixths(minima, 1),
    )


_FIVES_ASM = tl.constexpr(
    wider_nibbles_asm(
        """{
            .reg .b32 h;
            shr.u32 h, $5, $6;
            shl.b32 t, h, 4;
            lop3.b32 a, t, 0x10101010, a, 0xEA;
            shl.b32 t, h, 3;
            lop3.b32 b, t, 0x10101010, b, 0xEA;
        }"""
    )
)


@triton.jit
def fives_bf16(packed, more, shift):
    """Nibbles with a fifth bit, plus 128: those of the low nibbles at bit ``shift`` of ``more``,
    those of the high ones behind it. Four bytes at a time."""
    return tl.inline_asm_elementwise(
        _FIVES_ASM,
        "=r,=r,=r,=r,r,r,r,r,r,r",
        [packed, more, shift],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _integers(block, ELEMENT: tl.constexpr, NATIVE: tl.constexpr):
    """The integers of the low and of the high plane, [ROWS, 128]: int32, or bf16 and 128 more."""
    at = tl.arange(0, 128)
    if ELEMENT == "q4_k":
        packed = tl.load((block + 16)[:, None] + at[None, :])
        if NATIVE:
            return int4_nibbles_bf16(packed)
        else:
            return (packed & 15).to(tl.int32), (packed >> 4).to(tl.int32)
    else:
        packed = tl.load((block + 48)[:, None] + at[None, :])
        more = tl.load((block + 16)[:, None] + (at % 32)[None, :])
        shift = (at // 32 * 2)[None, :]
        if NATIVE:
            return fives_bf16(packed, more, shift)
        else:
            bits = more.to(tl.int32) >> shift
            low = (packed & 15).to(tl.int32) | (bits & 1) << 4
            return low, (packed >> 4).to(tl.int32) | (bits >> 1 & 1) << 4


@triton.jit
def superblock_numbers(block, ELEMENT: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """The values of the low and of the high plane [ROWS, 128] of the superblocks at ``block``,
    byte pointers [ROWS], rounded once. NATIVE: DTYPE is bf16, with packed arithmetic."""
    OFFSET: tl.constexpr = 128.0 if NATIVE else 0.0
    low, high = _integers(block, ELEMENT, NATIVE)
    scale, minimum, high_scale, high_minimum = _scales_and_minima(block)
    rest = spread_groups(minimum + OFFSET * scale, 128)
    high_rest = spread_groups(high_minimum + OFFSET * high_scale, 128)
    return (
        (low.to(tl.float32) * spread_groups(scale, 128) - rest).to(DTYPE),
        (high.to(tl.float32) * spread_groups(high_scale, 128) - high_rest).to(DTYPE),
    )


@triton.jit
def ones_beside(packed, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Ones of the shape of ``packed``; NATIVE: laid out as its nibbles are, and as free."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "{ mov.b32 $0, 0x3F803F80; mov.b32 $1, 0x3F803F80; }",
            "=r,=r,r",
            [packed],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.full(packed.shape, 1.0, DTYPE)


@triton.jit
def group_integers(
    block, CHUNK: tl.constexpr, ELEMENT: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr
):
    """The integers of the groups 2 CHUNK and 2 CHUNK + 1 of q4_k or q5_k, which share 32 bytes, and
    ones: [ROWS, 32] in DTYPE; NATIVE: the integers and 128 more."""
    at = tl.arange(0, 32)
    FIRST: tl.constexpr = 16 if ELEMENT == "q4_k" else 48
    packed = tl.load((block + FIRST + 32 * CHUNK)[:, None] + at[None, :])
    ones = ones_beside(packed, DTYPE, NATIVE)
    if ELEMENT == "q4_k":
        if NATIVE:
            low, high = int4_nibbles_bf16(packed)
        else:
            low, high = (packed & 15).to(DTYPE), (packed >> 4).to(DTYPE)
    else:
        more = tl.load((block + 16)[:, None] + at[None, :])
        if NATIVE:
            low, high = fives_bf16(packed, more, tl.full(packed.shape, 2 * CHUNK, tl.int32))
        else:
            bits = more.to(tl.int32) >> (2 * CHUNK)
            low = ((packed & 15).to(tl.int32) | (bits & 1) << 4).to(DTYPE)
            high = ((packed >> 4).to(tl.int32) | (bits >> 1 & 1) << 4).to(DTYPE)
    return low, high, ones
