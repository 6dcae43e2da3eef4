"""What a lane makes of words in registers, for ``hopper_mixed_numbers``: pairs of numbers, 32 bits
with the halves in bf16, and their products."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.lookup import NEXT_SELECTORS, NF4_LIFT, SELECTORS, entries_asm
from fusedmoe.quantization.formats.lookup import CODECS


@gluon.jit
def word_asm(ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, given):
    """What PTX makes of words, one by one."""
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, given, dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def four_words_asm(ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, given):
    return gl.inline_asm_elementwise(
        ASM, CONSTRAINTS, given, dtype=(gl.int32,) * 4, is_pure=True, pack=1
    )


@gluon.jit
def halves_asm(ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, given):
    """Both halves of a word."""
    return gl.inline_asm_elementwise(
        ASM, CONSTRAINTS, given, dtype=(gl.bfloat16,) * 2, is_pure=True, pack=1
    )


@gluon.jit
def take_int4(words):
    """Four pairs of a word's nibbles + 128: those of number i and i + 4."""
    return four_words_asm(
        """{
            .reg .b32 a, b, c;
            shr.u32 a, $4, 4;
            shr.u32 b, $4, 8;
            shr.u32 c, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, a, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, b, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, c, 0x000F000F, 0x43004300, 0xEA;
        }""",
        "=&r,=&r,=&r,=&r,r",
        (words,),
    )


@gluon.jit
def less(pairs, middle):
    return word_asm("sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", (pairs, middle))


@gluon.jit
def take_e2m1(words):
    """Four pairs of a word's nibbles, those of number i and i + 4, times 2^-126.

    Bits 8 to 6 of a half come from the word, all others from its signs alone, before both go to
    their places; signs that miss bit 15 fall on bits 8 to 6, or off the end. Left shifts are
    products, for which there is a pipe beside that of logic.
    """
    return four_words_asm(
        """{
            .reg .b32 even, odd, right, a, b;
            and.b32 even, $4, 0x08080808;
            and.b32 odd, $4, 0x80808080;
            shr.u32 right, $4, 6;
            mul.lo.u32 a, even, 64;
            mul.lo.u32 b, odd, 64;
            lop3.b32 a, 0x00070007, $4, a, 0xCA;
            lop3.b32 b, 0x00700070, $4, b, 0xCA;
            mul.lo.u32 $0, a, 64;
            mul.lo.u32 $1, b, 4;
            lop3.b32 a, 0x001C001C, right, even, 0xCA;
            mul.lo.u32 $2, a, 16;
            lop3.b32 $3, 0x01C001C0, right, odd, 0xCA;
        }""",
        "=&r,=&r,=&r,=&r,r",
        (words,),
    )


def _entries_asm(table: tuple[float, ...]) -> str:
    """A word -> four pairs of the entries that its nibbles name, those of number i and i + 4."""
    lines = ["{ .reg .b32 s, m, x, y, la, ha, lb, hb, p, q;", SELECTORS]
    lines += [*entries_asm(table, "a"), NEXT_SELECTORS, *entries_asm(table, "b")]
    for first, beside in ((0, "0x5140"), (2, "0x7362")):
        lines += [
            f"prmt.b32 p, la, ha, {beside}; prmt.b32 q, lb, hb, {beside};",
            f"prmt.b32 ${first}, p, q, 0x5410; prmt.b32 ${first + 1}, p, q, 0x7632;",
        ]
    return "\n".join([*lines, "}"])


NF4_ASM = gl.constexpr(_entries_asm(tuple(NF4_LIFT.value * x for x in CODECS["nf4"].table)))
IQ4_NL_ASM = gl.constexpr(_entries_asm(CODECS["iq4_nl"].table))


@gluon.jit
def take_entries(words, ELEMENT: gl.constexpr):
    """Four pairs of the entries that a word's nibbles name, those of number i and i + 4; nf4's
    times NF4_LIFT."""
    return four_words_asm(
        NF4_ASM if ELEMENT == "nf4" else IQ4_NL_ASM, "=&r,=&r,=&r,=&r,r", (words,)
    )


@gluon.jit
def take_int8(words, selector):
    """Pairs of a lane's two bytes: (128 + low seven bits) - (128 or, where negative, 256)."""
    return word_asm(
        """{
            .reg .b32 a, s;
            prmt.b32 a, $1, 0, $2;
            lop3.b32 s, a, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $0, a, s;
        }""",
        "=r,r,r",
        (words, selector),
    )


@gluon.jit
def take_e4m3(words, selector):
    """Pairs of a lane's two bytes; NaN becomes +-480."""
    return word_asm(
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
        (words, selector),
    )


@gluon.jit
def times(pairs, factor):
    """The halves of pairs times the halves of factor."""
    return halves_asm(
        """{
            .reg .b32 a;
            mul.rn.bf16x2 a, $2, $3;
            mov.b32 {$0, $1}, a;
        }""",
        "=h,=h,r,r",
        (pairs, factor),
    )


@gluon.jit
def times_both(pairs, factor, rest):
    """The halves of pairs times those of factor + rest, rounded once."""
    return halves_asm(
        """{
            .reg .b32 a;
            mul.rn.bf16x2 a, $2, $4;
            fma.rn.bf16x2 a, $2, $3, a;
            mov.b32 {$0, $1}, a;
        }""",
        "=h,=h,r,r,r",
        (pairs, factor, rest),
    )


@gluon.jit
def times_plus(pairs, factor, term):
    """The halves of pairs times factor plus term, both fp32, rounded once."""
    return halves_asm(
        """{
            .reg .b32 a;
            .reg .f32 x, y;
            shl.b32 a, $2, 16;
            mov.b32 x, a;
            and.b32 a, $2, 0xFFFF0000;
            mov.b32 y, a;
            fma.rn.f32 x, x, $3, $4;
            fma.rn.f32 y, y, $3, $4;
            cvt.rn.bf16x2.f32 a, y, x;
            mov.b32 {$0, $1}, a;
        }""",
        "=h,=h,r,f,f",
        (pairs, factor, term),
    )


@gluon.jit
def halves(pairs):
    return halves_asm("mov.b32 {$0, $1}, $2;", "=h,=h,r", (pairs,))


@gluon.jit
def as_pair(number):
    """fp32 as two equal halves in bf16, in one word."""
    return word_asm("cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", (number,))


@gluon.jit
def power_pair(exponent):
    """2^(e8m0 exponent) times 2^63 as ``as_pair`` would have it; from 2^65 on infinite."""
    return word_asm(
        """{
            .reg .b32 a;
            min.u32 a, $1, 192;
            mad.lo.u32 $0, a, 0x00800080, 0x1F801F80;
        }""",
        "=r,r",
        (exponent,),
    )


@gluon.jit
def power_pairs(exponents):
    """``power_pair`` of both exponents that are the low bytes of a word."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 a, most;
            .reg .b16 low, high;
            mov.b32 most, 0x00C000C0;
            prmt.b32 a, $2, 0, 0x4140;
            min.u16x2 a, a, most;
            mad.lo.u32 a, a, 128, 0x1F801F80;
            mov.b32 {low, high}, a;
            mov.b32 $0, {low, low};
            mov.b32 $1, {high, high};
        }""",
        "=r,=r,r",
        [exponents],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
