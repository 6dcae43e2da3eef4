"""From words of GGUF's superblocks (q4_k, q5_k) to pairs in registers.

Of 64 columns, 32 bytes hold the first half in low nibbles and the second in high ones. Lane t of
four takes words 2 t and 2 t + 1: its eight columns of either half. q5_k has a fifth bit for each of
eight such halves in 32 more bytes, a box beside that of nibbles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.hopper_mixed_sextets import eight_pairs


@gluon.constexpr_function
def doubled_layout(STEPS=1):
    """[32, 8 * STEPS] words: of each step, two neighbours for each lane."""
    registers, lanes = [[0, 1], [0, 8]][:STEPS], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, 8 * STEPS])


@gluon.jit
def plane_column(k, BOX: gl.constexpr, ELEMENT: gl.constexpr):
    """The word of a row at which a box of step k begins. Superblocks are four steps; they begin
    with four words of scales, then, q5_k, eight of bits."""
    if ELEMENT == "q4_k":
        return k // 4 * 36 + k % 4 * 8 + 4
    elif BOX == 0:
        return k // 4 * 44 + k % 4 * 8 + 12
    else:
        return k // 4 * 44 + 4


@gluon.jit
def two_words(box, row, SIDE: gl.constexpr):
    """A lane's two words [32, 4] of a box's rows from ``row`` on."""
    words = box.slice(row, SIDE, 0).load(doubled_layout())
    return gl.split(gl.reshape(words, [SIDE, 4, 2]))


@gluon.jit
def load_planes(w_ring, at, row, SIDE: gl.constexpr, ELEMENT: gl.constexpr):
    """Two words of nibbles and, for q5_k, two of fifth bits."""
    nibbles = two_words(w_ring.index(at), row, SIDE)
    if ELEMENT == "q4_k":
        return nibbles
    else:
        bits = two_words(w_ring.index(at + 1), row, SIDE)
        return nibbles[0], nibbles[1], bits[0], bits[1]


@gluon.jit
def load_planes_pair(rows, SIDE: gl.constexpr):
    """A lane's two words of nibbles of both steps that these rows [32, 16] have."""
    words = gl.reshape(rows.load(doubled_layout(2)), [SIDE, 2, 4, 2])
    first, second = gl.split(gl.permute(words, [0, 2, 3, 1]))
    return gl.split(first), gl.split(second)


@gluon.constexpr_function
def planes_asm(FIVES):
    """Two words of nibbles, FIVES: two of bits and which of a byte's eight bits is that of low
    nibbles -> eight pairs of integers plus 128: bytes i of both, low nibbles, then high."""
    lines = ["{ .reg .b32 p, h, k, l;"]
    if FIVES:
        lines.append("shr.u32 k, $10, $12; shr.u32 l, $11, $12;")
    for i in range(4):
        places = f"0x{4 + i}{4 + i}{i}{i}"
        lines += [
            f"prmt.b32 p, $8, $9, {places};",
            f"lop3.b32 ${i}, p, 0x000F000F, 0x43004300, 0xEA; shr.u32 p, p, 4;",
            f"lop3.b32 ${4 + i}, p, 0x000F000F, 0x43004300, 0xEA;",
        ]
        if FIVES:
            lines += [
                f"prmt.b32 h, k, l, {places}; shl.b32 p, h, 4; shl.b32 h, h, 3;",
                f"lop3.b32 ${i}, p, 0x00100010, ${i}, 0xEA;",
                f"lop3.b32 ${4 + i}, h, 0x00100010, ${4 + i}, 0xEA;",
            ]
    return "\n".join([*lines, "}"])


@gluon.jit
def take_planes(words, k, ELEMENT: gl.constexpr):
    """Pairs of what ``load_planes`` gave of step k, [32, 8] four times: those of number i and i + 4
    of every run of eight columns."""
    if ELEMENT == "q4_k":
        return eight_pairs(planes_asm(False), (words[0], words[1]))
    else:
        given = (words[0], words[1], words[2], words[3], k % 4 * 2)
        return eight_pairs(planes_asm(True), given)
