"""A few PTX instructions in Python, to run the inline assembly of kernels without a GPU."""

from __future__ import annotations

import re

import torch

WORD = 0xFFFFFFFF


def run_ptx(source: str, inputs: list[int], outputs: int) -> list[int]:
    """The 32-bit words that ``source`` leaves in $0 ... when $outputs ... hold ``inputs``."""
    registers: dict[str, int] = {f"${outputs + i}": word for i, word in enumerate(inputs)}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in re.sub(r"[{}]", "", source).split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        name, target, *operands = words
        registers[target] = _OPERATIONS[name](*map(value, operands)) & WORD
    return [registers[f"${i}"] for i in range(outputs)]


def words_of(values: torch.Tensor) -> list[int]:
    """The bytes of a tensor as 32-bit words."""
    return [word & WORD for word in values.contiguous().view(torch.int32).tolist()]


def _as_tensor(word: int) -> torch.Tensor:
    signed = word - (1 << 32) if word >> 31 else word
    return torch.tensor([signed], dtype=torch.int32)


def pair(word: int) -> torch.Tensor:
    """The two bf16 numbers of a word, the lower one first."""
    return _as_tensor(word).view(torch.bfloat16)


def _word(numbers: torch.Tensor) -> int:
    return words_of(numbers.bfloat16())[0]


def _fp32(word: int) -> torch.Tensor:
    """The fp32 number of a word, in fp64."""
    return _as_tensor(word).view(torch.float32).double()[0]


def _single(number: torch.Tensor) -> int:
    return words_of(number.float()[None])[0]


def _prmt(a: int, b: int, selector: int) -> int:
    pool = a | b << 32
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool >> 8 * (nibble & 7) & 255
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def _lop3(a: int, b: int, c: int, table: int) -> int:
    out = 0
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "min.u32": min,
    "min.u16x2": lambda a, b: min(a & 0xFFFF, b & 0xFFFF) | min(a >> 16, b >> 16) << 16,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "sub.rn.bf16x2": lambda a, b: _word(pair(a).float() - pair(b).float()),
    "mul.rn.bf16x2": lambda a, b: _word(pair(a).float() * pair(b).float()),
    "fma.rn.f32": lambda a, b, c: _single(_fp32(a) * _fp32(b) + _fp32(c)),
    "cvt.rn.bf16x2.f32": lambda a, b: _word(torch.stack([_fp32(b), _fp32(a)])),
    "fma.rn.bf16x2": lambda a, b, c: _word(pair(a).double() * pair(b).double() + pair(c).double()),
}
