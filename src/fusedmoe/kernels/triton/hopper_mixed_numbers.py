"""From words of weights in shared memory to an operand of the WGMMA in registers.

The A operand of a WGMMA wants of every 16 columns those of number 2t, 2t + 1, 2t + 8 and 2t + 9 in
lane t of four: a quarter of two words of nibbles, or half of two words of bytes. So all lanes that
share a word load it, and each takes its part (``selectors``): neither weights nor rows of x are put
into another order.

Two neighbouring columns make a pair, one word of 32 bits with the halves in bf16. ``taken`` makes
pairs of words, without their scales; ``side`` multiplies by those.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.quantized_common import float_scale

STEP = gl.constexpr(64)  # columns
SIDE = gl.constexpr(32)  # weight rows of low, or of high, in one product
HALF_EXPONENT = gl.constexpr(2.0**63)


@gluon.constexpr_function
def words_of_step(ELEMENT):
    """Words of 32 bits that hold a row's columns of one step."""
    return 8 if ELEMENT in ("int4", "e2m1") else 16


@gluon.constexpr_function
def scales_of_step(GROUP):
    """Scales that a row has in one step; GROUP columns share one, 0: all do."""
    return 1 if GROUP == 0 or GROUP >= 64 else 64 // GROUP


@gluon.constexpr_function
def loaded_layout(WORDS):
    """[32, WORDS] words; the lanes that share a word have it all."""
    if WORDS == 8:
        registers, lanes = [[0, 1], [0, 2], [0, 4]], [[0, 0], [0, 0]]
    else:
        registers, lanes = [[0, 2], [0, 4], [0, 8]], [[0, 0], [0, 1]]
    lanes += [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, WORDS])


@gluon.constexpr_function
def shared_layout(WORDS, COUNT):
    """[32, COUNT, WORDS / COUNT, lanes that share a word]: as ``loaded_layout``, by scales."""
    flat, inner = loaded_layout(WORDS), WORDS // COUNT

    def split(row, word, lane=0):
        return [row, word // inner, word % inner, lane]

    sharing = [[0, 0, 0, 1], [0, 0, 0, 2]][: flat.lane_bases.count([0, 0])]
    lanes = sharing + [split(*base) for base in flat.lane_bases if base != [0, 0]]
    return gl.DistributedLinearLayout(
        [split(*base) for base in flat.reg_bases],
        lanes,
        [split(*base) for base in flat.warp_bases],
        [],
        [32, COUNT, inner, 1 << len(sharing)],
    )


@gluon.constexpr_function
def by_scale(WORDS, COUNT):
    """Layout of [32, COUNT] scales."""
    return gl.SliceLayout(2, gl.SliceLayout(3, shared_layout(WORDS, COUNT)))


@gluon.jit
def selectors(ELEMENT: gl.constexpr, COUNT: gl.constexpr):
    """Which bytes of a word a lane takes, as prmt wants to know it: [1, 1, 1, lanes]."""
    layout: gl.constexpr = shared_layout(words_of_step(ELEMENT), COUNT)
    SHARING: gl.constexpr = layout.shape[3]
    lane_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    lane = gl.arange(0, SHARING, lane_layout)
    if ELEMENT == "int4":
        chosen = lane * 0x0101 + 0x0400
    elif ELEMENT == "e2m1":
        chosen = lane * 0x1010 + 0x0040
    elif ELEMENT == "int8":
        chosen = lane * 0x0202 + 0x4140
    else:
        chosen = lane * 0x2020 + 0x1404
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(chosen, 0), 1), 2)


@gluon.jit
def take_int4(words, selector, middle):
    """Pairs of a lane's two nibbles + 128 - middle."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a;
            shr.u32 a, $1, 4;
            prmt.b32 a, $1, a, $2;
            lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $0, a, $3;
        }""",
        "=r,r,r,r",
        [words, selector, middle],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def take_e2m1(words, selector):
    """Pairs of a lane's two nibbles, times 2^-126."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a, s;
            shl.b32 a, $1, 4;
            prmt.b32 a, $1, a, $2;
            and.b32 s, a, 0x80008000;
            shr.u32 a, a, 6;
            lop3.b32 $0, a, 0x01C001C0, s, 0xEA;
        }""",
        "=r,r,r",
        [words, selector],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def take_int8(words, selector):
    """Pairs of a lane's two bytes: (128 + low seven bits) - (128 or, where negative, 256)."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a, s;
            prmt.b32 a, $1, 0, $2;
            lop3.b32 s, a, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $0, a, s;
        }""",
        "=r,r,r",
        [words, selector],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def take_e4m3(words, selector):
    """Pairs of a lane's two bytes; NaN becomes +-480."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a, s;
            prmt.b32 a, $1, 0, $2;
            and.b32 s, a, 0x80008000;
            shr.u32 a, a, 4;
            lop3.b32 a, a, 0x07F007F0, s, 0xEA;
            mov.b32 s, 0x7B807B80;
            mul.rn.bf16x2 $0, a, s;
        }""",
        "=r,r,r",
        [words, selector],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def times(pairs, factor):
    """The halves of pairs times the halves of factor."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a;
            mul.rn.bf16x2 a, $2, $3;
            mov.b32 {$0, $1}, a;
        }""",
        "=h,=h,r,r",
        [pairs, factor],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def times_both(pairs, factor, rest):
    """The halves of pairs times those of factor + rest, rounded once."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a;
            mul.rn.bf16x2 a, $2, $4;
            fma.rn.bf16x2 a, $2, $3, a;
            mov.b32 {$0, $1}, a;
        }""",
        "=h,=h,r,r,r",
        [pairs, factor, rest],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def halves(pairs):
    return gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;",
        "=h,=h,r",
        [pairs],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def as_pair(number):
    """fp32 as two equal halves in bf16, in one word."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $1;",
        "=r,f",
        [number],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def power_pair(exponent):
    """2^(e8m0 exponent) times 2^63 as ``as_pair`` would have it; from 2^65 on infinite."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a;
            min.u32 a, $1, 192;
            mad.lo.u32 $0, a, 0x00800080, 0x1F801F80;
        }""",
        "=r,r",
        [exponent],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def factors(scale, ELEMENT: gl.constexpr):
    """Scales [32, COUNT] as a tuple of pairs [32, COUNT, 1, 1]; those of e2m1 times 2^63.

    Numbers of eight bits in groups of 32 get what bf16 cuts off a scale as a second pair: nearly
    all of their products are rounded, and twice would be too often.
    """
    if ELEMENT == "e2m1" and scale.dtype == gl.uint8:
        return (spread(power_pair(scale.to(gl.int32))),)
    elif ELEMENT == "e2m1":
        return (spread(as_pair(scale.to(gl.float32) * HALF_EXPONENT)),)
    elif ELEMENT == "int4" or scale.dtype == gl.uint8 or scale.dtype == gl.bfloat16:
        return (spread(as_pair(float_scale(scale))),)
    else:
        exact = float_scale(scale)
        rest = exact - exact.to(gl.bfloat16).to(gl.float32)
        return spread(as_pair(exact)), spread(as_pair(rest))


@gluon.jit
def spread(pair):
    return gl.expand_dims(gl.expand_dims(pair, 2), 3)


@gluon.jit
def taken(words, zero, selector, ELEMENT: gl.constexpr, COUNT: gl.constexpr):
    """Pairs of numbers from words [32, WORDS]; zero [32, COUNT] or None."""
    WORDS: gl.constexpr = words.shape[1]
    layout: gl.constexpr = gl.SliceLayout(3, shared_layout(WORDS, COUNT))
    words = gl.reshape(words, [SIDE, COUNT, WORDS // COUNT])
    words = gl.expand_dims(gl.convert_layout(words, layout, assert_trivial=True), 3)
    if ELEMENT == "int4":
        if zero is None:
            middle = gl.full([1, 1, 1, 1], 0x43084308, gl.int32, words.type.layout)
        else:
            middle = as_pair(zero.to(gl.float32) + 128.0)
            middle = gl.expand_dims(gl.expand_dims(middle, 2), 3)
        return take_int4(words, selector, middle)
    elif ELEMENT == "e2m1":
        return take_e2m1(words, selector)
    elif ELEMENT == "int8":
        return take_int8(words, selector)
    else:
        return take_e4m3(words, selector)


@gluon.jit
def side(pairs, factor):
    """bf16 [32, STEP]: pairs times what ``factors`` gave for them, if anything."""
    if len(factor) == 0:
        even, odd = halves(pairs)
    elif len(factor) == 1:
        even, odd = times(pairs, factor[0])
    else:
        even, odd = times_both(pairs, factor[0], factor[1])
    return gl.reshape(gl.join(even, odd), [SIDE, STEP])


@gluon.jit
def fragment(low, high, MMA: gl.constexpr):
    """low and high [32, STEP] as an A operand [64, STEP], eights in turn; moves no data."""
    both = gl.reshape(gl.join(low, high), [SIDE // 8, 8, STEP, 2])
    both = gl.reshape(gl.permute(both, [0, 3, 1, 2]), [2 * SIDE, STEP])
    return gl.convert_layout(both, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
