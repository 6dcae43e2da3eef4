"""Floats of six bits (MXFP6: e3m2, e2m3) as numbers in registers.

Three words hold sixteen columns (``quantization/formats/mxfp6.py``): tiles [ROWS, UNITS] of them
give eight tiles of numbers [ROWS, 2 * UNITS], tile j with the columns 2 j and 2 j + 1 of each unit.
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.word_tiles import beside

UNIT_COLUMNS = tl.constexpr(16)
PAIRS = tl.constexpr(8)


@triton.jit
def load_units(words, first, columns, UNITS: tl.constexpr):
    """The three words [ROWS, UNITS] of each unit from column ``first`` of ``columns`` on; ``words``
    points to rows [ROWS]. Zeros past the end."""
    # Neither units nor rows are contiguous. Triton then gives neighbouring threads neighbours in
    # the first dimension: with units there, they read the same sectors.
    at = first // UNIT_COLUMNS + tl.arange(0, UNITS)
    inside = (at < columns // UNIT_COLUMNS)[:, None]
    ptrs = words[None, :] + (3 * at)[:, None]
    low, middle = tl.load(ptrs, inside, 0), tl.load(ptrs + 1, inside, 0)
    return tl.trans(low), tl.trans(middle), tl.trans(tl.load(ptrs + 2, inside, 0))


@triton.jit
def _sextet(units, COLUMN: tl.constexpr, ELEMENT: tl.constexpr):
    """The float of a column of units, in fp32, short of 2^124 or 2^126: exponent and mantissa are
    moved to where fp32 has them, subnormal numbers included."""
    MANTISSA: tl.constexpr = 2 if ELEMENT == "e3m2" else 3
    WORD: tl.constexpr = 6 * COLUMN // 32
    SHIFT: tl.constexpr = 6 * COLUMN % 32
    code = units[WORD] >> SHIFT
    if SHIFT > 26:
        code = code & ((1 << (32 - SHIFT)) - 1) | units[WORD + 1] << (32 - SHIFT)
    bits = (code & 31) << (23 - MANTISSA) | (code & 32) << 26
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sextet_pair(units, PAIR: tl.constexpr, factor, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """Tile PAIR of units, in DTYPE, times the scales ``factor``, fp32 [ROWS, 2 * UNITS]."""
    lift = 2.0**124 if ELEMENT == "e3m2" else 2.0**126
    numbers = beside(_sextet(units, 2 * PAIR, ELEMENT), _sextet(units, 2 * PAIR + 1, ELEMENT))
    return (numbers * lift * factor).to(DTYPE)


def _pairs_asm(mantissa: int) -> str:
    """Three words -> eight pairs of bf16, short of 2^124 or 2^126.

    The words are four times three bytes with four codes each: bytes are sorted by their place among
    the three, and codes are collected in the high six bits of a byte, four of a place at a time. A
    byte becomes the high one of a number, whose sign is then in place, and the rest moves behind an
    exponent of zeros.
    """
    lines = [
        "{ .reg .b32 t, l, m, h, b, c, v, s;",
        "prmt.b32 t, $8, $9, 0x0630; prmt.b32 l, t, $10, 0x5210;",
        "prmt.b32 t, $8, $9, 0x0741; prmt.b32 m, t, $10, 0x6210;",
        "prmt.b32 t, $8, $9, 0x0052; prmt.b32 h, t, $10, 0x7410;",
        "shr.u32 b, l, 4; and.b32 b, b, 0x0C0C0C0C; shl.b32 t, m, 4;"
        "lop3.b32 b, t, 0xF0F0F0F0, b, 0xEA;",
        "shr.u32 c, m, 2; and.b32 c, c, 0x3C3C3C3C; shl.b32 t, h, 6;"
        "lop3.b32 c, t, 0xC0C0C0C0, c, 0xEA;",
        "shl.b32 l, l, 2;",
    ]
    mask = "0x03E003E0" if mantissa == 2 else "0x01F001F0"
    for place in range(4):
        for half, codes in enumerate(("l, b", "c, h")):
            lines += [
                f"prmt.b32 v, {codes}, 0x{place + 4}{place + 4}{place}{place};",
                "and.b32 s, v, 0x80008000;",
                f"shr.u32 t, v, {mantissa + 3};",
                f"lop3.b32 ${2 * place + half}, t, {mask}, s, 0xEA;",
            ]
    return "\n".join([*lines, "}"])


_E3M2_ASM = tl.constexpr(_pairs_asm(2))
_E2M3_ASM = tl.constexpr(_pairs_asm(3))
_EIGHT_WORDS = tl.constexpr((tl.int32,) * 8)


@triton.jit
def sextet_pairs_bf16(units, ELEMENT: tl.constexpr):
    """All tiles of units, short of 2^124 or 2^126, two numbers of bf16 in a word."""
    ASM: tl.constexpr = _E3M2_ASM if ELEMENT == "e3m2" else _E2M3_ASM
    return tl.inline_asm_elementwise(
        ASM,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
        [units[0], units[1], units[2]],
        dtype=_EIGHT_WORDS,
        is_pure=True,
        pack=1,
    )
