"""Whether weights that were packed are still the same: for copies made for speed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Source(NamedTuple):
    """Which values were packed: where they lie, and how often they had been written to."""

    address: int
    version: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Source:
        return cls(weight.data_ptr(), -1 if weight.is_inference() else weight._version)
