"""GGUF's K formats: 256 columns in one run of bytes, which carries its own scales; and its two
older ones with minima, which files have where rows are no multiple of 256: 32 columns in one.

    q4_k 144 bytes  d, dmin fp16; 12 bytes of 6-bit scales and minima; 128 bytes of nibbles
    q5_k 176 bytes  as q4_k, with 32 bytes of fifth bits before the nibbles
    q2_k  84 bytes  16 bytes of 4-bit scales (low) and minima (high); 64 bytes of bit pairs; d and
                    dmin fp16
    q6_k 212 bytes  128 bytes of nibbles, 64 of high bit pairs, 16 int8 scales, d fp16
    q3_k 112 bytes  32 bytes of high bits, 64 of bit pairs, 12 of 6-bit scales, d fp16

    q4_1  20 bytes  d, m fp16; 16 bytes of nibbles, columns 0-15 low, 16-31 high
    q5_1  24 bytes  d, m fp16; 32 fifth bits; nibbles as q4_1

q6_k and q3_k end in two bytes of padding, which files have not: superblocks begin at whole words.

q4_k, q5_k: 8 groups of 32 columns, value = d * scale * q - dmin * minimum; q2_k likewise in 16
groups of 16 columns. q6_k, q3_k: 16 groups of 16 columns, value = d * scale * (q - 32), and
d * (scale - 32) * (q - 4). q4_1, q5_1: d * q + m. data is uint8 [e, N, K / 256 * bytes] (K / 32),
but for that padding as in the file; there is no scale beside it. These are read, not written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat

COLUMNS = 256


class SuperBlock(NamedTuple):
    """A codec: ``nbytes`` for ``columns``, of which files have ``in_files``; ``read`` makes them
    values [..., columns]. ``floats``: where its numbers in fp16 lie."""

    nbytes: int
    in_files: int
    floats: slice
    read: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    columns: int = COLUMNS

    def decode(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        blocks = data.unflatten(-1, (-1, self.nbytes))
        return self.read(blocks, dtype).flatten(-2)

    def padded(self, blocks: torch.Tensor) -> torch.Tensor:
        """Superblocks as files have them [..., n, in_files] -> data [..., n * nbytes]."""
        return F.pad(blocks, (0, self.nbytes - self.in_files)).flatten(-2)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        raise ValueError("GGUF's superblocks are read, not written: choose another format")

    def scale_for(self, amax: torch.Tensor) -> torch.Tensor:
        return self.encode(amax)


def _fp16(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Two bytes [..., 2] -> a number [..., 1]."""
    return raw.contiguous().view(torch.float16).to(dtype)


def _scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes [..., 12] -> 8 scales and 8 minima of 6 bits each, uint8 [..., 8].

    The first four of each are the low 6 bits of bytes 0-3 and 4-7; of the last four, bytes 8-11
    have 4 bits each (scales low, minima high), and the top 2 bits of bytes 0-7 the rest.
    """
    first, second, third = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], -1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], -1)
    return scales, minima


def _nibbles(packed: torch.Tensor, run: int) -> torch.Tensor:
    """Runs of ``run`` bytes -> their low nibbles, then their high ones: [..., 2 * bytes]."""
    runs = packed.unflatten(-1, (-1, run))
    return torch.stack([runs & 15, runs >> 4], -2).flatten(-3)


def scales_and_minima(
    blocks: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Superblocks of q4_k or q5_k [..., nbytes] -> what multiplies the integers of each group, and
    what is subtracted then, [..., 8]."""
    scales, minima = _scales_and_minima(blocks[..., 4:16])
    scale = _fp16(blocks[..., 0:2], dtype) * scales.to(dtype)
    return scale, _fp16(blocks[..., 2:4], dtype) * minima.to(dtype)


def _with_minima(blocks: torch.Tensor, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """d * scale * number - dmin * minimum, numbers [..., 256] in 8 groups."""
    scale, least = scales_and_minima(blocks, dtype)
    groups = numbers.to(dtype).unflatten(-1, (8, 32))
    return (groups * scale[..., None] - least[..., None]).flatten(-2)


def _q4_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _with_minima(blocks, _nibbles(blocks[..., 16:144], 32), dtype)


def _q5_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    fifth = [(blocks[..., 16:48] >> bit) & 1 for bit in range(8)]
    numbers = _nibbles(blocks[..., 48:176], 32) | (torch.cat(fifth, -1) << 4)
    return _with_minima(blocks, numbers, dtype)


def _q6_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    pairs = blocks[..., 128:192].unflatten(-1, (2, 32))
    high = torch.stack([(pairs >> shift) & 3 for shift in (0, 2, 4, 6)], -2).flatten(-3)
    numbers = _nibbles(blocks[..., 0:128], 64) | (high << 4)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).to(dtype)
    scale = _fp16(blocks[..., 208:210], dtype) * scales
    groups = (numbers.to(dtype) - 32).unflatten(-1, (16, 16))
    return (groups * scale[..., None]).flatten(-2)


def _pairs(packed: torch.Tensor) -> torch.Tensor:
    """64 bytes of bit pairs, of 32 bytes the lowest pairs first: [..., 256]."""
    runs = packed.unflatten(-1, (2, 32))
    return torch.stack([(runs >> shift) & 3 for shift in (0, 2, 4, 6)], -2).flatten(-3)


def _q2_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    groups = _pairs(blocks[..., 16:80]).to(dtype).unflatten(-1, (16, 16))
    scale = _fp16(blocks[..., 80:82], dtype) * (blocks[..., :16] & 15).to(dtype)
    least = _fp16(blocks[..., 82:84], dtype) * (blocks[..., :16] >> 4).to(dtype)
    return (groups * scale[..., None] - least[..., None]).flatten(-2)


def _q3_k(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    high = torch.cat([(blocks[..., :32] >> bit) & 1 for bit in range(8)], -1)
    numbers = _pairs(blocks[..., 32:96]) | high << 2
    # Of a scale, a nibble in the first 8 bytes, and in the last 4 two bits.
    low = torch.cat([blocks[..., 96:104] & 15, blocks[..., 96:104] >> 4], -1)
    top = torch.cat([(blocks[..., 104:108] >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
    scale = _fp16(blocks[..., 108:110], dtype) * ((low | top << 4).to(dtype) - 32)
    groups = (numbers.to(dtype) - 4).unflatten(-1, (16, 16))
    return (groups * scale[..., None]).flatten(-2)


def _q4_1(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    numbers = _nibbles(blocks[..., 4:20], 16).to(dtype)
    return numbers * _fp16(blocks[..., 0:2], dtype) + _fp16(blocks[..., 2:4], dtype)


def _q5_1(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bit = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifth = ((blocks[..., 4:8, None] >> bit) & 1).flatten(-2)
    numbers = (_nibbles(blocks[..., 8:24], 16) | fifth << 4).to(dtype)
    return numbers * _fp16(blocks[..., 0:2], dtype) + _fp16(blocks[..., 2:4], dtype)


CODECS = {
    "q2_k": SuperBlock(84, 84, slice(80, 84), _q2_k),
    "q3_k": SuperBlock(112, 110, slice(108, 110), _q3_k),
    "q4_k": SuperBlock(144, 144, slice(0, 4), _q4_k),
    "q5_k": SuperBlock(176, 176, slice(0, 4), _q5_k),
    "q6_k": SuperBlock(212, 210, slice(208, 210), _q6_k),
    "q4_1": SuperBlock(20, 20, slice(0, 4), _q4_1, 32),
    "q5_1": SuperBlock(24, 24, slice(0, 4), _q5_1, 32),
}


def superblock_format(name: str) -> QuantFormat:
    """By a name of ``CODECS``."""
    return QuantFormat(element=name, group=GroupShape(1, CODECS[name].columns), scale_dtype=None)
