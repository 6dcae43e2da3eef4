"""Four bits that stand for the entries of a table, with a scale per group of columns.

data  uint8 [e, N, K / 2]: column 2c in the low nibble of byte c
scale fp32, bf16 or fp16 [e, N, K / g]
value = table[nibble] * scale

nf4 (QLoRA, appendix E): the quantiles of a normal distribution, scaled to 1; g is 64 as a rule.
iq4_nl (GGUF): sixteen integers up to 127; g is 32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.quantization.formats.int4 import pack_nibbles, unpack_nibbles
from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat


class LookUp(NamedTuple):
    """A codec over a rising table of 16 values."""

    table: tuple[float, ...]

    def decode(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        table = torch.tensor(self.table, dtype=dtype, device=data.device)
        return table[unpack_nibbles(data).long()]

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest entry (the lower one of two that are equally near), packed in pairs."""
        table = torch.tensor(self.table, dtype=values.dtype, device=values.device)
        middles = (table[1:] + table[:-1]) / 2
        return pack_nibbles(torch.bucketize(values, middles).to(torch.uint8))

    def scale_for(self, amax: torch.Tensor) -> torch.Tensor:
        """The largest magnitude of a group falls on the largest entry on both sides."""
        return amax / min(-self.table[0], self.table[-1])


NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
IQ4_NL_TABLE = tuple(
    map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
)

CODECS = {"nf4": LookUp(NF4_TABLE), "iq4_nl": LookUp(IQ4_NL_TABLE)}
# The factor, to 2^-16, with which entries lose least when they are rounded to bf16: nf4's lose
# 0.8e-3 of their norm, without it 1.4e-3.
LIFTS = {"nf4": 1.4367218017578125, "iq4_nl": 1.0}


def nf4_group(columns: int = 64) -> QuantFormat:
    return QuantFormat(element="nf4", group=GroupShape(1, columns))


NF4 = nf4_group()
IQ4_NL = QuantFormat(element="iq4_nl", group=GroupShape(1, 32), scale_dtype=torch.float16)
