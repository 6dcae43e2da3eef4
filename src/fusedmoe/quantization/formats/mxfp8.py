"""MXFP8 weights: e4m3 with a power of two per 32 columns.

data  float8_e4m3fn [e, N, K]
scale uint8 [e, N, K / 32], 2^(s - 127); the least that brings the group within 448
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.formats.e8m0 import ceil_e8m0
from fusedmoe.quantization.formats.fp8 import FP8_MAX, decode, encode
from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat

__all__ = ["MXFP8", "decode", "encode", "scale_for"]

MXFP8 = QuantFormat(element="e4m3", group=GroupShape(1, 32), scale_dtype=torch.uint8)


def scale_for(amax: torch.Tensor) -> torch.Tensor:
    """e8m0 codes; nothing saturates."""
    return ceil_e8m0(amax, FP8_MAX)
