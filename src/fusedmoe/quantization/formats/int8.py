"""int8 weights with scales per row or per group of columns.

    data  int8 [e, N, K]
    scale fp32, bf16 or fp16 [e, N, 1] or [e, N, K / g]; amax / 127
    zero_point int8, as scale, where the format is not symmetric: (data - zero_point) * scale

Checkpoints that store unsigned bytes with offset 128 hold the same numbers, 128 more.
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.keys import PER_ROW, GroupShape
from fusedmoe.quantization.tensor import QuantFormat

INT8_MAX, INT8_MIN = 127, -128


def int8_group(
    columns: int,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    act_order: bool = False,
) -> QuantFormat:
    """Groups of ``columns``; -1 is one scale per row."""
    return QuantFormat(
        element="int8",
        group=GroupShape(1, columns),
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        act_order=act_order,
    )


INT8_CHANNEL = QuantFormat(element="int8", group=PER_ROW)


def encode(values: torch.Tensor) -> torch.Tensor:
    """The nearest integers, ties to even, saturating."""
    return values.round().clamp(INT8_MIN, INT8_MAX).to(torch.int8)


def decode(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return data.to(dtype)


def scale_for(amax: torch.Tensor) -> torch.Tensor:
    return amax / INT8_MAX
