"""MXFP4 weights: e2m1 with a power of two per 32 columns (OCP Microscaling Formats 1.0).

data  uint8 [e, N, K / 2]: column 2c in the low nibble of byte c; sign, exponent (2), mantissa
scale uint8 [e, N, K / 32], 2^(s - 127)
values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, times the scale
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.formats.e8m0 import floor_e8m0
from fusedmoe.quantization.formats.int4 import pack_nibbles, unpack_nibbles
from fusedmoe.quantization.formats.minifloat import E2M1
from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat

MXFP4 = QuantFormat(element="e2m1", group=GroupShape(1, 32), scale_dtype=torch.uint8)


def encode(values: torch.Tensor) -> torch.Tensor:
    """The nearest e2m1, ties to even, saturating at 6, packed in pairs."""
    return pack_nibbles(E2M1.encode(values))


def decode(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return E2M1.decode(unpack_nibbles(data), dtype)


def scale_for(amax: torch.Tensor) -> torch.Tensor:
    """e8m0 codes by OCP's rule: values up to a third above 6 saturate."""
    return floor_e8m0(amax, E2M1.max_exponent)
