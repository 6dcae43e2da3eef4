"""MXFP6 weights: e3m2 or e2m3 with a power of two per 32 columns.

    data  uint8 [e, N, K * 6 / 8]: columns 4c to 4c + 3 in bytes 3c to 3c + 2, column 4c lowest:
          code0 | code1 << 6 | code2 << 12 | code3 << 18, least significant byte first
    scale uint8 [e, N, K / 32], 2^(s - 127)

No GPU of today multiplies them as they are; kernels here dequantize.
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.formats.e8m0 import floor_e8m0
from fusedmoe.quantization.formats.minifloat import E2M3, E3M2, MiniFloat
from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat

MXFP6_E3M2 = QuantFormat(element="e3m2", group=GroupShape(1, 32), scale_dtype=torch.uint8)
MXFP6_E2M3 = QuantFormat(element="e2m3", group=GroupShape(1, 32), scale_dtype=torch.uint8)


def pack_sextets(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] below 64 -> uint8 [..., K * 3 / 4]."""
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], -1).flatten(-2)


def unpack_sextets(data: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_sextets``."""
    x, y, z = data.unflatten(-1, (-1, 3)).unbind(-1)
    codes = [x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2]
    return torch.stack(codes, -1).flatten(-2)


class Sextets:
    """Encode, decode and scales of one of the two element types."""

    def __init__(self, kind: MiniFloat) -> None:
        self._kind = kind

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest codes, ties to even, saturating, packed."""
        return pack_sextets(self._kind.encode(values))

    def decode(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._kind.decode(unpack_sextets(data), dtype)

    def scale_for(self, amax: torch.Tensor) -> torch.Tensor:
        """e8m0 codes by OCP's rule."""
        return floor_e8m0(amax, self._kind.max_exponent)


CODECS = {"e3m2": Sextets(E3M2), "e2m3": Sextets(E2M3)}
