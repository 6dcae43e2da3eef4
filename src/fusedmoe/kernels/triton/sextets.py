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
def sextet_numbers(units, factor, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """Four planes of values [ROWS, UNITS] in DTYPE from 24 bits each, int32, times the scales
    ``factor``, fp32 [ROWS, UNITS]."""
    lift = 2.0**124 if ELEMENT == "e3m2" else 2.0**126
    return (
        (_sextet(units, 0, ELEMENT) * lift * factor).to(DTYPE),
        (_sextet(units, 1, ELEMENT) * lift * factor).to(DTYPE),
        (_sextet(units, 2, ELEMENT) * lift * factor).to(DTYPE),
        (_sextet(units, 3, ELEMENT) * lift * factor).to(DTYPE),
    )


@triton.jit
def load_units(ptrs, inside):
    """The three bytes at ``ptrs`` as 24 bits of an int32, 0 where not ``inside``."""
    low = tl.load(ptrs, inside, 0).to(tl.int32)
    middle = tl.load(ptrs + 1, inside, 0).to(tl.int32)
    high = tl.load(ptrs + 2, inside, 0).to(tl.int32)
    return low | middle << 8 | high << 16


@triton.jit
def four_planes(a):
    """a [SLOTS, 4 * UNITS] as the four planes [SLOTS, UNITS] of its columns."""
    SLOTS: tl.constexpr = a.shape[0]
    UNITS: tl.constexpr = a.shape[1] // 4
    even, odd = tl.split(tl.reshape(a, (SLOTS, UNITS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth
