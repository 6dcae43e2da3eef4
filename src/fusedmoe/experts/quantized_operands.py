"""Operands: what the quantized experts multiply, as their kernels are told."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedmoe.quantization.keys import QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor


@dataclass(frozen=True)
class Operands:
    """The weights of a layer and how the rows that meet them are rounded.

    The keys are those of the rows entering w1 and w2, None: not at all. The scales fp32 [1] belong
    to static keys. ``emulate``: rows are rounded to their format, but multiplied as the floats they
    came as; so they are where one of the keys is None. ``order`` int32 [e, H]: the column of x that
    meets each column of w1, where they are not in x's order; for weights of 4 bits those of even
    number first (see ``act_order``).
    """

    w1: QuantizedTensor
    w2: QuantizedTensor
    a1: QuantKey | None = None
    a2: QuantKey | None = None
    a1_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    w1_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    emulate: bool = False
    order: torch.Tensor | None = None

    @property
    def floating_rows(self) -> bool:
        """Whether the products take rows in floating point."""
        return self.emulate or self.a1 is None or self.a2 is None

    @property
    def columns(self) -> tuple[int, int]:
        """Columns after which a scale changes in each GEMM, -1 for none."""
        a1, a2 = (None, None) if self.floating_rows else (self.a1, self.a2)
        return _columns(self.w1, a1), _columns(self.w2, a2)


def _columns(w: QuantizedTensor, key: QuantKey | None) -> int:
    sizes = (w.format.group.col, -1 if key is None else key.group_shape.col)
    return min((size for size in sizes if size > 0), default=-1)
