"""Bits out of words: the packings that checkpoints use, and the canonical bytes made of them.

All functions work on one matrix; the packed axis is the last. Words are little-endian, the lowest
bits first.
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.formats.int4 import pack_nibbles

# AWQ puts columns 0, 2, 4, 6, 1, 3, 5, 7 of eight into a word: column j is in nibble AWQ_PLACE[j].
AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [R, W] -> uint8 [R, count]: number i takes ``bits`` bits from bit i * bits on.

    Numbers may lie across two words (3, 5, 6 and 7 bits). Needs W * 32 >= count * bits.
    """
    if words.shape[-1] * 32 < count * bits:
        raise ValueError(f"{words.shape[-1]} words hold fewer than {count} numbers of {bits} bits")
    if 8 % bits == 0:
        # Not contiguous(): that leaves an axis of one element any stride, which view refuses.
        raw = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        mask = (1 << bits) - 1
        numbers = [(raw >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(numbers, -1).flatten(-2)[..., :count]
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    start = torch.arange(count, device=words.device) * bits
    word, shift = start // 32, start % 32
    both = wide[..., word] | (wide[..., word + 1] << 32)
    return ((both >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def unpack_awq(words: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [R, W] -> uint8 [R, count] nibbles, in AWQ's order within each word."""
    nibbles = unpack_words(words, 4, 8 * words.shape[-1]).unflatten(-1, (-1, 8))
    return nibbles[..., list(AWQ_PLACE)].flatten(-2)[..., :count]


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The same pairs with the first number in the high nibble, and back."""
    return (packed << 4) | (packed >> 4)


def integers(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [R, K] of ``bits`` bits, zero at half their range -> the canonical bytes of integers.

    Up to 4 bits: int4 [R, K / 2]; more: int8 [R, K]. Zero moves to 8 and to 0.
    """
    if bits <= 4:
        return pack_nibbles(numbers + (8 - (1 << (bits - 1))))
    return offset_to_int8(numbers, bits)


def zero_points(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """As ``integers`` for zero points: uint8 (int4) or int8, one number each."""
    if bits <= 4:
        return numbers + (8 - (1 << (bits - 1)))
    return offset_to_int8(numbers, bits)


def offset_to_int8(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 numbers of ``bits`` bits minus half their range, as int8."""
    return (numbers.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def element_of(bits: int) -> str:
    """The canonical element that holds integers of this many bits."""
    return "int4" if bits <= 4 else "int8"
