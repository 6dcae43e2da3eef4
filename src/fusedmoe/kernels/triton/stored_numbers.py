"""Elements of a step as numbers, and the scales of its groups, as they are stored.

For weights whose columns are bytes or nibbles: int8, e4m3, int4, e2m1, and nibbles that name the
entries of a table.
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.lookup import looked_up, looked_up_bf16
from fusedmoe.kernels.triton.quantized_common import (
    e2m1_nibbles_bf16,
    e4m3_bf16,
    float_scale,
    half_scale_bits,
    int4_nibbles_bf16,
    int8_bf16,
    minus_bf16,
    nibbles,
    spread_groups,
    times_bf16,
    times_terms_bf16,
    two_terms_bf16,
)


@triton.jit
def load_groups(
    ptr, rows, first, count, stride, DEPTH: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr
):
    """Scales or zero points from column ``first`` on: [ROWS] where a step has one group, else
    [ROWS, DEPTH / GROUP]; 0 past ``count`` groups."""
    group = first // GROUP
    if DEPTH <= GROUP:
        return tl.load(ptr + rows * stride + tl.minimum(group, count - 1))
    else:
        at = group + tl.arange(0, DEPTH // GROUP)
        ptrs = ptr + (rows * stride)[:, None] + at[None, :]
        if EVEN:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, (at < count)[None, :], 0.0)


@triton.jit
def stored_numbers(packed, zero, ELEMENT: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """The stored elements as numbers, zero points subtracted: low and high nibbles, or the same
    tensor twice. ``zero`` broadcasts to ``packed`` or is None."""
    if ELEMENT == "int4":
        if NATIVE:
            low, high = int4_nibbles_bf16(packed)
            if zero is None:
                middle = tl.full(packed.shape, 136.0, tl.bfloat16)
            else:
                middle = tl.broadcast_to((zero.to(tl.float32) + 128.0).to(DTYPE), packed.shape)
            return minus_bf16(low, middle), minus_bf16(high, middle)
        else:
            low, high = nibbles(packed, ELEMENT, DTYPE)
            middle = 8.0 if zero is None else zero.to(DTYPE)
            return (low - middle).to(DTYPE), (high - middle).to(DTYPE)
    elif ELEMENT == "e2m1":
        if NATIVE:
            return e2m1_nibbles_bf16(packed)
        else:
            return nibbles(packed, ELEMENT, DTYPE)
    elif ELEMENT == "nf4" or ELEMENT == "iq4_nl":
        if NATIVE:
            return looked_up_bf16(packed, ELEMENT)
        else:
            low, high = (packed & 15).to(tl.int32), (packed >> 4).to(tl.int32)
            return looked_up(low, ELEMENT, DTYPE), looked_up(high, ELEMENT, DTYPE)
    else:
        if not NATIVE:
            value = packed.to(tl.float32).to(DTYPE)
        elif ELEMENT == "int8":
            value = int8_bf16(packed)
        else:
            value = e4m3_bf16(packed)
        if zero is not None:
            value = value - zero.to(DTYPE)
        return value, value


@triton.jit
def scaled_numbers(
    low, high, scale, ELEMENT: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr
):
    """``stored_numbers`` times the scales of their groups [ROWS, COUNT], in DTYPE; e2m1's in bf16
    short of 2^63. Scales of another type are not rounded before: what one loses, all numbers of its
    group would lose the same way."""
    SCALE: tl.constexpr = scale.dtype
    FLOATS: tl.constexpr = tl.float32 == SCALE or tl.float16 == SCALE or tl.bfloat16 == SCALE
    EXACT: tl.constexpr = FLOATS and SCALE != DTYPE and ELEMENT != "e2m1"
    PACKED: tl.constexpr = low.shape[1]
    if NATIVE and EXACT:
        more, less = two_terms_bf16(float_scale(scale))
        more, less = spread_groups(more, PACKED), spread_groups(less, PACKED)
        return times_terms_bf16(low, more, less), times_terms_bf16(high, more, less)
    elif NATIVE:
        if ELEMENT == "e2m1":
            factor = half_scale_bits(scale).to(tl.bfloat16, bitcast=True)
        else:
            factor = float_scale(scale).to(DTYPE)
        factor = spread_groups(factor, PACKED)
        return times_bf16(low, factor), times_bf16(high, factor)
    else:
        factor = float_scale(scale)
        factor = spread_groups(factor if EXACT else factor.to(DTYPE), PACKED)
        return (low * factor).to(DTYPE), (high * factor).to(DTYPE)
