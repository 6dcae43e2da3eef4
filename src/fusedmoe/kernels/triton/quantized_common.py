"""Pieces that the quantized GEMMs share: rows of a tile, elements to numbers, the epilogue.

A tile is ROWS weight rows by SLOTS slots: weights are the M side of the product, so that they can
be converted in registers on their way to it, and few slots waste nothing. Where the activation is
gated, eight rows of gate and eight of up alternate, which puts both numbers of a feature into one
thread.
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.activation import gated_activation, plain_activation


@triton.jit
def tile_rows(tile, N, ROWS: tl.constexpr, GATED: tl.constexpr):
    """(shard [ROWS], feature [ROWS]) of the weight rows of a tile; features wrap around at N."""
    m = tl.arange(0, ROWS)
    if GATED:
        return m // 8 % 2, (tile * (ROWS // 2) + m // 16 * 8 + m % 8) % N
    else:
        return m * 0, (tile * ROWS + m) % N


@triton.jit
def float_scale(scale):
    """A scale as fp32: floating point as it is, uint8 as the power of two that e8m0 means."""
    if scale.dtype == tl.uint8:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        bits = tl.where(exponent == 255, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)


@triton.jit
def spread_groups(groups, PACKED: tl.constexpr):
    """Numbers of groups, [ROWS] or [ROWS, COUNT], one per stored element: [ROWS, PACKED]."""
    ROWS: tl.constexpr = groups.shape[0]
    if len(groups.shape) == 1:
        return tl.broadcast_to(groups[:, None], (ROWS, PACKED))
    else:
        COUNT: tl.constexpr = groups.shape[1]
        wide = tl.broadcast_to(groups[:, :, None], (ROWS, COUNT, PACKED // COUNT))
        return tl.reshape(wide, (ROWS, PACKED))


@triton.jit
def half_scale_bits(scale):
    """The bits of a scale times 2^63 in bf16: what e2m1 numbers short of 2^-126 are multiplied by,
    the other 2^63 being left to their sum. An e8m0 exponent needs no arithmetic; one past 191 is
    taken for it, 2^64 times a weight of 6 being no weight, and 255 is NaN."""
    if scale.dtype == tl.uint8:
        exponent = tl.minimum(scale.to(tl.int32), 191) + 63
        return tl.where(scale == 255, 0x7FC0, exponent << 7).to(tl.int16)
    else:
        return (
            (scale.to(tl.float32) * 9223372036854775808.0)
            .to(tl.bfloat16)
            .to(tl.int16, bitcast=True)
        )


@triton.jit
def _e2m1(nibble, DTYPE: tl.constexpr):
    """Numbers of sign, two exponent bits, one mantissa bit; nibble int32."""
    size = nibble & 7
    normal = (((size >> 1) + 126) << 23 | (size & 1) << 22).to(tl.float32, bitcast=True)
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    return tl.where(nibble > 7, -value, value).to(DTYPE)


@triton.jit
def nibbles(packed, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """Low and high nibbles as numbers, int4 as its unsigned value."""
    low = (packed & 15).to(tl.int32)
    high = (packed >> 4).to(tl.int32)
    if ELEMENT == "int4":
        return low.to(DTYPE), high.to(DTYPE)
    else:
        return _e2m1(low, DTYPE), _e2m1(high, DTYPE)


@triton.jit
def nibbles_asm(ASM: tl.constexpr, packed):
    """Two tiles of bf16 from bytes, of low nibbles and of high ones; four bytes at a time."""
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )


@triton.jit
def bytes_asm(ASM: tl.constexpr, stored):
    """bf16 from bytes, four at a time."""
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,r", [stored], dtype=tl.bfloat16, is_pure=True, pack=4
    )


@triton.jit
def pairs_asm(ASM: tl.constexpr, x, y):
    """bf16 from two numbers in bf16 each, two at a time."""
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [x, y], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def int4_nibbles_bf16(packed):
    """As ``nibbles``, plus 128: the nibble becomes the mantissa of 2^7, without an addition.

    Four bytes at a time; low nibbles then high ones.
    """
    return nibbles_asm(
        """{
            .reg .b32 a, b;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            lop3.b32 $0, a, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, b, 0x000F000F, 0x43004300, 0xEA;
            shr.u32 a, a, 4;
            shr.u32 b, b, 4;
            lop3.b32 $2, a, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, b, 0x000F000F, 0x43004300, 0xEA;
        }""",
        packed,
    )


def wider_nibbles_asm(bits: str) -> str:
    """PTX of nibbles and further bits of numbers, plus 128, two of bf16 in a word.

    $4 holds four bytes of nibbles; ``bits`` puts the rest of the low ones, a, and of the high ones,
    b, a byte for each, into their high halves. The low ones become $0 and $1, the high ones $2 and
    $3: the mantissa of 2^7 holds seven bits, without an addition.
    """
    return f"""{{
        .reg .b32 a, b, t;
        and.b32 a, $4, 0x0F0F0F0F;
        shr.u32 b, $4, 4;
        and.b32 b, b, 0x0F0F0F0F;
        {bits}
        prmt.b32 $0, a, 0x43, 0x4140;
        prmt.b32 $1, a, 0x43, 0x4342;
        prmt.b32 $2, b, 0x43, 0x4140;
        prmt.b32 $3, b, 0x43, 0x4342;
    }}"""


@triton.jit
def e2m1_nibbles_bf16(packed):
    """As ``nibbles``, times 2^-126: exponent and mantissa bits are moved, nothing is computed."""
    return nibbles_asm(
        """{
            .reg .b32 a, b, s, t;
            prmt.b32 a, $4, 0, 0x1404;
            prmt.b32 b, $4, 0, 0x3424;
            shl.b32 s, a, 4;
            shr.u32 t, a, 2;
            and.b32 s, s, 0x80008000;
            lop3.b32 $0, t, 0x01C001C0, s, 0xEA;
            shl.b32 s, b, 4;
            shr.u32 t, b, 2;
            and.b32 s, s, 0x80008000;
            lop3.b32 $1, t, 0x01C001C0, s, 0xEA;
            and.b32 s, a, 0x80008000;
            shr.u32 t, a, 6;
            lop3.b32 $2, t, 0x01C001C0, s, 0xEA;
            and.b32 s, b, 0x80008000;
            shr.u32 t, b, 6;
            lop3.b32 $3, t, 0x01C001C0, s, 0xEA;
        }""",
        packed,
    )


@triton.jit
def int8_bf16(stored):
    """int8 as bf16, exactly: (128 + low seven bits) - (128 or, where negative, 256)."""
    return bytes_asm(
        """{
            .reg .b32 a, b, s;
            prmt.b32 a, $2, 0, 0x4140;
            prmt.b32 b, $2, 0, 0x4342;
            lop3.b32 s, a, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $0, a, s;
            lop3.b32 s, b, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 b, b, 0x007F007F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $1, b, s;
        }""",
        stored,
    )


@triton.jit
def e4m3_bf16(stored):
    """e4m3 bytes as bf16, exactly; NaN becomes +-480."""
    return bytes_asm(
        """{
            .reg .b32 a, b, s, scale;
            mov.b32 scale, 0x7B807B80;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            and.b32 s, a, 0x80008000;
            shr.u32 a, a, 4;
            lop3.b32 a, a, 0x07F007F0, s, 0xEA;
            mul.rn.bf16x2 $0, a, scale;
            and.b32 s, b, 0x80008000;
            shr.u32 b, b, 4;
            lop3.b32 b, b, 0x07F007F0, s, 0xEA;
            mul.rn.bf16x2 $1, b, scale;
        }""",
        stored,
    )


@triton.jit
def times_bf16(x, y):
    """x * y for bf16, two at a time."""
    return pairs_asm("mul.rn.bf16x2 $0, $1, $2;", x, y)


@triton.jit
def two_terms_bf16(x):
    """x in fp32 as the sum of two numbers in bf16, 2^-15 of it left out. They are cut off, not
    rounded: GPUs round single numbers to bf16 at an eighth of the speed."""
    bits = x.to(tl.int32, bitcast=True)
    rest = (x - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    more = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return more, (rest >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def times_terms_bf16(x, more, less):
    """x * (more + less) for bf16, two at a time; what is rounded before the sum is small."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }",
        "=r,r,r,r",
        [x, more, less],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def minus_bf16(x, y):
    """x - y for bf16, two at a time."""
    return pairs_asm("sub.rn.bf16x2 $0, $1, $2;", x, y)


@triton.jit
def gate_and_up(total):
    """The rows of gate and of up of a tile [ROWS, SLOTS], [ROWS / 2, SLOTS] each."""
    ROWS: tl.constexpr = total.shape[0]
    SLOTS: tl.constexpr = total.shape[1]
    eights = tl.permute(tl.reshape(total, (ROWS // 16, 2, 8, SLOTS)), (0, 2, 3, 1))
    gate, up = tl.split(eights)
    return tl.reshape(gate, (ROWS // 2, SLOTS)), tl.reshape(up, (ROWS // 2, SLOTS))


@triton.jit
def finished(
    total, bias_ptr, expert, row, stride_bias_e, stride_bias_n, limit, alpha, beta,
    FORMULA: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The sums of a tile of weight rows, with their bias (None: there is none), through the
    activation (FORMULA None: there is none)."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * stride_bias_e + row * stride_bias_n)
        total += bias.to(tl.float32)[:, None]
    if GATED:
        gate, up = gate_and_up(total)
        return gated_activation(FORMULA, gate, up, limit, alpha, beta)
    elif FORMULA is not None:
        return plain_activation(FORMULA, total)
    else:
        return total


@triton.jit
def place_of(column, D, ORDER: tl.constexpr):
    """Where a column of D lies in an order of ``kernels/column_orders.py``."""
    if ORDER == "halves":
        return column % 2 * (D // 2) + column // 2
    elif ORDER == "units":
        return column // 128 * 128 + column // 2 % 8 * 16 + column // 16 % 8 * 2 + column % 2
    elif ORDER == "blocks":
        tile = column // 16 % 2 * 2 + column // 2 % 2
        at = column // 32 % 4 * 8 + column // 4 % 4 * 2 + column % 2
        return column // 128 * 128 + tile * 32 + at
    elif ORDER == "sixes":
        tile = column // 32 % 2 * 4 + column // 64 % 2 * 2 + column // 2 % 2
        at = column // 128 % 2 * 16 + column // 4 % 8 * 2 + column % 2
        return column // 256 * 256 + tile * 32 + at
    elif ORDER == "lanes":
        return column // 32 * 32 + column % 4 * 8 + column // 8 % 4 * 2 + column // 4 % 2
    else:
        return column


@triton.jit
def store_features(value, c_ptr, places_ptr, slots, live, tile, N, stride_cm, ORDER: tl.constexpr):
    """c[slot, place of feature] = value[feature, slot]. Places [N], or in this order."""
    WIDTH: tl.constexpr = value.shape[0]
    feature = tile * WIDTH + tl.arange(0, WIDTH)
    if places_ptr is None:
        column = place_of(feature, N, ORDER)
    else:
        column = tl.load(places_ptr + feature, feature < N, 0)
    c_ptrs = c_ptr + (slots * stride_cm)[None, :] + column[:, None]
    tl.store(c_ptrs, value.to(c_ptr.dtype.element_ty), live[None, :] & (feature < N)[:, None])
