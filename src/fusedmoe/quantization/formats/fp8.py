"""fp8 weights: e4m3 with fp32 scales per tensor, per row, or per block of rows and columns.

    data  float8_e4m3fn [e, N, K]
    scale fp32 [e, S], [e, N, 1] or [e, S * ceil(N / S / bn), ceil(K / bk)]; amax / 448

Checkpoints with e8m0 block scales hold the same numbers: powers of two, in fp32 here.
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.keys import PER_ROW, PER_TENSOR, GroupShape
from fusedmoe.quantization.tensor import QuantFormat

FP8_MAX = 448.0


def fp8_block(rows: int = 128, columns: int = 128) -> QuantFormat:
    return QuantFormat(element="e4m3", group=GroupShape(rows, columns))


FP8_TENSOR = QuantFormat(element="e4m3", group=PER_TENSOR)
FP8_CHANNEL = QuantFormat(element="e4m3", group=PER_ROW)
FP8_BLOCK = fp8_block()


def encode(values: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3, ties to even, saturating at 448; NaN stays NaN."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def decode(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return data.to(dtype)


def scale_for(amax: torch.Tensor) -> torch.Tensor:
    """The scale that puts ``amax`` at 448."""
    return divided(amax, FP8_MAX)


def divided(x: torch.Tensor, number: float) -> torch.Tensor:
    """x / number, rounded to the nearest on every device: on a GPU, torch multiplies by the
    reciprocal of a number that is no tensor of that GPU."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)
