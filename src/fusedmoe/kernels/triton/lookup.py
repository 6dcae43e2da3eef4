"""Nibbles that stand for the entries of a table (nf4, iq4_nl), as numbers in registers.

The tables are those of ``quantization/formats/lookup.py``.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.quantized_common import nibbles_asm
from fusedmoe.quantization.formats.lookup import CODECS, LIFTS

NF4_LIFT = tl.constexpr(LIFTS["nf4"])
_NF4 = tl.constexpr(CODECS["nf4"].table)
_IQ4_NL = tl.constexpr(CODECS["iq4_nl"].table)


@triton.jit
def _of_eight(low, middle, high, T: tl.constexpr, FIRST: tl.constexpr):
    """One of eight entries of T from FIRST on, by three bits of its place."""
    a = tl.where(low, T[FIRST + 1], T[FIRST])
    b = tl.where(low, T[FIRST + 3], T[FIRST + 2])
    c = tl.where(low, T[FIRST + 5], T[FIRST + 4])
    d = tl.where(low, T[FIRST + 7], T[FIRST + 6])
    return tl.where(high, tl.where(middle, d, c), tl.where(middle, b, a))


@triton.jit
def looked_up(nibble, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """The entries that nibbles, int32, stand for."""
    T: tl.constexpr = _NF4 if ELEMENT == "nf4" else _IQ4_NL
    low, middle, high = (nibble & 1) != 0, (nibble & 2) != 0, (nibble & 4) != 0
    below = _of_eight(low, middle, high, T, 0)
    above = _of_eight(low, middle, high, T, 8)
    return tl.where(nibble > 7, above, below).to(DTYPE)


def entries_asm(table: tuple[float, ...], target: str) -> list[str]:
    """PTX: the bf16 entries that s and m name, four of them, their low bytes into l``target`` and
    their high ones into h``target``; x and y are lost.

    A permutation of bytes picks four out of eight at a time, so an entry comes in four parts: its
    two bytes, each from the lower or the upper half of the table. s are the lower three bits of
    nibbles, m chooses halves (``SELECTORS``).
    """
    bits = torch.tensor(table, dtype=torch.bfloat16, device="cpu").view(torch.int16).tolist()
    lines = []
    for byte, shift in (("l", 0), ("h", 8)):
        a, b, c, d = (
            sum(((bits[first + i] >> shift) & 255) << (8 * i) for i in range(4))
            for first in (0, 4, 8, 12)
        )
        lines += [
            f"mov.b32 x, {a:#010x};",
            f"mov.b32 y, {c:#010x};",
            f"prmt.b32 x, x, {b:#010x}, s;",
            f"prmt.b32 y, y, {d:#010x}, s;",
            f"prmt.b32 {byte}{target}, x, y, m;",
        ]
    return lines


SELECTORS = """and.b32 s, $4, 0x77777777;
    shr.u32 m, $4, 1;
    lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;"""
"""PTX: s and m of ``entries_asm`` from $4, for its four low nibbles."""
NEXT_SELECTORS = "shr.u32 s, s, 16; shr.u32 m, m, 16;"
"""PTX: the same for the four high ones."""


def _lookup_asm(table: tuple[float, ...]) -> str:
    """Four bytes -> the bf16 entries of their low nibbles, then of their high ones."""
    lines = ["{ .reg .b32 s, m, x, y, l, h;", SELECTORS]
    for half in range(2):
        lines += [NEXT_SELECTORS] * half + entries_asm(table, "")
        lines += [f"prmt.b32 ${half}, l, h, 0x6240;", f"prmt.b32 ${2 + half}, l, h, 0x7351;"]
    return "\n".join([*lines, "}"])


_NF4_ASM = tl.constexpr(_lookup_asm(tuple(NF4_LIFT.value * x for x in CODECS["nf4"].table)))
_IQ4_NL_ASM = tl.constexpr(_lookup_asm(CODECS["iq4_nl"].table))


@triton.jit
def looked_up_bf16(packed, ELEMENT: tl.constexpr):
    """Low and high nibbles of bytes as the entries they stand for, nf4's times NF4_LIFT; four bytes
    at a time."""
    ASM: tl.constexpr = _NF4_ASM if ELEMENT == "nf4" else _IQ4_NL_ASM
    return nibbles_asm(ASM, packed)
