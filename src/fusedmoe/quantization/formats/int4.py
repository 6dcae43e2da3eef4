"""int4 weights with scales per row or per group of columns, with or without zero points.

data  uint8 [e, N, K / 2]: column 2c in the low nibble of byte c, 2c + 1 in the high one
scale fp32, bf16 or fp16 [e, N, 1] or [e, N, K / g]
zero_point uint8, as scale, one byte each; 8 where the format is symmetric
value = (nibble - zero_point) * scale, nibble in [0, 15]
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat

OFFSET = 8


def int4_group(
    columns: int,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    act_order: bool = False,
) -> QuantFormat:
    """Groups of ``columns``; -1 is one scale per row."""
    return QuantFormat(
        element="int4",
        group=GroupShape(1, columns),
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        act_order=act_order,
    )


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] below 16 -> uint8 [..., K / 2], the even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(data: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_nibbles``."""
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)


def encode(values: torch.Tensor) -> torch.Tensor:
    """Integers with the zero point added, rounded (ties to even), saturated to [0, 15], packed."""
    return pack_nibbles(values.round().clamp(0, 15).to(torch.uint8))


def decode(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nibbles, 0 to 15; the zero point is still in them."""
    return unpack_nibbles(data).to(dtype)
