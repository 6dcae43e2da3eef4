"""From words of floats in six bits (e3m2, e2m3) in shared memory to pairs in registers.

Sixteen columns are three words. A step's twelve words lie in three boxes of four; of the columns
8 t to 8 t + 7 of 32, which lane t of four takes, there are 48 bits: all lanes load all words, and
each keeps the two that hold its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BOXES = gl.constexpr(3)


@gluon.constexpr_function
def boxed_layout():
    """[32, 4] words of a box, in every lane of a row's four."""
    registers, lanes = [[0, 1], [0, 2]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, 4])


@gluon.constexpr_function
def lanes_layout():
    """[32, 4]: rows by lanes."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([], lanes, [[8, 0], [16, 0]], [], [32, 4])


@gluon.jit
def single(words):
    """[32] words as [32, 1] beside lanes; moves no data."""
    rows: gl.constexpr = gl.SliceLayout(1, lanes_layout())
    return gl.expand_dims(gl.convert_layout(words, rows, assert_trivial=True), 1)


@gluon.jit
def four_words(box, row, SIDE: gl.constexpr):
    """The words [32, 1] of a box's rows from ``row`` on."""
    words = box.slice(row, SIDE, 0).load(boxed_layout())
    even, odd = gl.split(gl.reshape(words, [SIDE, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return single(first), single(second), single(third), single(fourth)


@gluon.jit
def own(lane, a, b, c, d):
    """[32, 4]: the lanes' words of these four."""
    odd, late = lane % 2 != 0, lane > 1
    return gl.where(late, gl.where(odd, d, c), gl.where(odd, b, a))


@gluon.jit
def load_sextets(w_ring, at, row, lane, SIDE: gl.constexpr):
    """The two words [32, 4] that hold a lane's columns of a step's first 32, and of its last."""
    a, b, c, d = four_words(w_ring.index(BOXES * at), row, SIDE)
    e, f, g, h = four_words(w_ring.index(BOXES * at + 1), row, SIDE)
    i, j, k, l = four_words(w_ring.index(BOXES * at + 2), row, SIDE)  # noqa: E741
    first, second = own(lane, a, b, d, e), own(lane, b, c, e, f)
    return first, second, own(lane, g, h, j, k), own(lane, h, i, k, l)


@gluon.jit
def lanes_of_row():
    """[1, 4]: 0 to 3."""
    return gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, lanes_layout())), 0)


@gluon.constexpr_function
def sextets_asm(MANTISSA):
    """Four words, the last 48 bits of each two in odd lanes, else the first -> eight pairs of bf16,
    short of 2^124 or 2^126: columns i and i + 4 of the first eight, then of the second.

    Three bytes have four codes. Bytes are sorted by their place among three, and codes collected
    in the high six bits of bytes; a byte becomes the high one of a number, whose sign is then in
    place, and the rest moves behind an exponent of zeros.
    """
    lines = [
        "{ .reg .b32 t, x, y, z, l, m, h, b, c, v, s;",
        "mad.lo.u32 t, $12, 0x2222, 0x3210; prmt.b32 x, $8, $9, t;",
        "mad.lo.u32 t, $12, 0x2222, 0x5410; prmt.b32 y, $9, $10, t;",
        "mad.lo.u32 t, $12, 0x2222, 0x5432; prmt.b32 z, $10, $11, t;",
        "prmt.b32 t, x, y, 0x0630; prmt.b32 l, t, z, 0x5210;",
        "prmt.b32 t, x, y, 0x0741; prmt.b32 m, t, z, 0x6210;",
        "prmt.b32 t, x, y, 0x0052; prmt.b32 h, t, z, 0x7410;",
        "shr.u32 b, l, 4; and.b32 b, b, 0x0C0C0C0C; shl.b32 t, m, 4;",
        "lop3.b32 b, t, 0xF0F0F0F0, b, 0xEA;",
        "shr.u32 c, m, 2; and.b32 c, c, 0x3C3C3C3C; shl.b32 t, h, 6;",
        "lop3.b32 c, t, 0xC0C0C0C0, c, 0xEA;",
        "shl.b32 l, l, 2;",
    ]
    mask = {2: "0x03E003E0", 3: "0x01F001F0"}[MANTISSA]
    for half, places in enumerate(("0x1100", "0x3322")):
        for code, letter in enumerate("lbch"):
            lines += [
                f"prmt.b32 v, {letter}, {letter}, {places};",
                "and.b32 s, v, 0x80008000;",
                f"shr.u32 v, v, {MANTISSA + 3};",
                f"lop3.b32 ${4 * half + code}, v, {mask}, s, 0xEA;",
            ]
    return "\n".join([*lines, "}"])


@gluon.jit
def take_sextets(words, lane, ELEMENT: gl.constexpr):
    """Pairs of the words that ``load_sextets`` gives, [32, 8] four times: those of number i and
    i + 4 of every run of eight columns."""
    MANTISSA: gl.constexpr = 2 if ELEMENT == "e3m2" else 3
    given = (words[0], words[1], words[2], words[3], lane % 2)
    return eight_pairs(sextets_asm(MANTISSA), given)


@gluon.constexpr_function
def constraints(GIVEN):
    """Of eight results, written before all that is given has been read."""
    return ",".join(["=&r"] * 8 + ["r"] * GIVEN)


@gluon.jit
def eight_pairs(ASM: gl.constexpr, given):
    """What ASM makes of a lane's words, [32, 8] four times: numbers i and i + 4 of its eights."""
    taken = gl.inline_asm_elementwise(
        ASM, constraints(len(given)), given, dtype=(gl.int32,) * 8, is_pure=True, pack=1
    )
    return (
        both_halves(taken[0], taken[4]),
        both_halves(taken[1], taken[5]),
        both_halves(taken[2], taken[6]),
        both_halves(taken[3], taken[7]),
    )


@gluon.jit
def both_halves(first, second):
    """[32, 4] of a step's first columns and of its last as [32, 8]; moves no data."""
    return gl.reshape(gl.permute(gl.join(first, second), [0, 2, 1]), [first.shape[0], 8])
