"""Names for how a tensor is quantized, as selection compares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class GroupShape(NamedTuple):
    """How many (rows, columns) share one scale; -1 is the whole extent."""

    row: int
    col: int


PER_TENSOR = GroupShape(-1, -1)
PER_TOKEN = GroupShape(1, -1)
PER_CHANNEL = GroupShape(-1, 1)


@dataclass(frozen=True)
class QuantKey:
    """One quantized operand: element type, whether scales are stored, and what shares a scale.

    ``dtype`` is a torch dtype or one of the names that torch lacks ("int4", "mxfp4", "nvfp4", ...).
    """

    dtype: torch.dtype | str
    static: bool
    group_shape: GroupShape
    symmetric: bool = True
