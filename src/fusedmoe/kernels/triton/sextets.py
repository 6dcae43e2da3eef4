"""Floats of six bits (MXFP6: e3m2, e2m3) as numbers in registers.

Three bytes hold four columns (``quantization/formats/mxfp6.py``): a tile of [ROWS, UNITS] of them
gives four planes of numbers, the columns 4 u, 4 u + 1, 4 u + 2 and 4 u + 3.
"""

import triton
import triton.language as tl


@triton.jit
def _sextet(units, PLACE: tl.constexpr, ELEMENT: tl.constexpr):
    """The float at one of the four places of 24 bits, in fp32, short of 2^124 or 2^126: exponent
    and mantissa are moved to where fp32 has them, subnormal numbers included."""
    MANTISSA: tl.constexpr = 2 if ELEMENT == "e3m2" else 3
    code = units >> (6 * PLACE)
    bits = (code & 31) << (23 - MANTISSA) | (code & 32) << 26
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sextet_numbers(low, middle, high, factor, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """Four planes of values [ROWS, UNITS] in DTYPE from three bytes each, times the scales
    ``factor``, fp32 [ROWS, UNITS]."""
    units = low.to(tl.int32) | middle.to(tl.int32) << 8 | high.to(tl.int32) << 16
    lift = 2.0**124 if ELEMENT == "e3m2" else 2.0**126
    return (
        (_sextet(units, 0, ELEMENT) * lift * factor).to(DTYPE),
        (_sextet(units, 1, ELEMENT) * lift * factor).to(DTYPE),
        (_sextet(units, 2, ELEMENT) * lift * factor).to(DTYPE),
        (_sextet(units, 3, ELEMENT) * lift * factor).to(DTYPE),
    )


def _planes_asm(mantissa: int) -> str:
    """Three times four bytes, of four units -> their four planes in bf16, short of 2^124 or 2^126.

    Codes are collected in the high six bits of a byte, four at a time; a byte becomes the high one
    of a number, whose sign is then in place, and the rest moves behind an exponent of zeros.
    """
    collect = (
        "shl.b32 c, $8, 2; and.b32 c, c, 0xFCFCFCFC;",
        "shr.u32 c, $8, 4; and.b32 c, c, 0x0C0C0C0C; shl.b32 t, $9, 4;"
        "lop3.b32 c, t, 0xF0F0F0F0, c, 0xEA;",
        "shr.u32 c, $9, 2; and.b32 c, c, 0x3C3C3C3C; shl.b32 t, $10, 6;"
        "lop3.b32 c, t, 0xC0C0C0C0, c, 0xEA;",
        "and.b32 c, $10, 0xFCFCFCFC;",
    )
    mask = "0x03E003E0" if mantissa == 2 else "0x01F001F0"
    lines = ["{ .reg .b32 c, t, v, s;"]
    for plane, codes in enumerate(collect):
        lines.append(codes)
        for half, selector in enumerate(("0x1404", "0x3424")):
            lines += [
                f"prmt.b32 v, c, 0, {selector};",
                "and.b32 s, v, 0x80008000;",
                f"shr.u32 t, v, {mantissa + 3};",
                f"lop3.b32 ${2 * plane + half}, t, {mask}, s, 0xEA;",
            ]
    return "\n".join([*lines, "}"])


_E3M2_ASM = tl.constexpr(_planes_asm(2))
_E2M3_ASM = tl.constexpr(_planes_asm(3))


@triton.jit
def sextets_bf16(low, middle, high, ELEMENT: tl.constexpr):
    """The four planes of numbers from three bytes each, in bf16, short of 2^124 or 2^126."""
    ASM: tl.constexpr = _E3M2_ASM if ELEMENT == "e3m2" else _E2M3_ASM
    return tl.inline_asm_elementwise(
        ASM,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
        [low, middle, high],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def load_bytes(ptrs, inside):
    """The three bytes of each unit at ``ptrs``, 0 where not ``inside``."""
    return tl.load(ptrs, inside, 0), tl.load(ptrs + 1, inside, 0), tl.load(ptrs + 2, inside, 0)


@triton.jit
def four_planes(a):
    """a [SLOTS, 4 * UNITS] as the four planes [SLOTS, UNITS] of its columns."""
    SLOTS: tl.constexpr = a.shape[0]
    UNITS: tl.constexpr = a.shape[1] // 4
    even, odd = tl.split(tl.reshape(a, (SLOTS, UNITS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth
