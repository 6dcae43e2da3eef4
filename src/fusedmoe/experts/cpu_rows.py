"""What the products with integer weights on a CPU share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def sizes_in_parts(counts: int | Sequence[int], parts: int) -> int | list[int]:
    return counts * parts if isinstance(counts, int) else [count * parts for count in counts]


def one_by_one(
    linear: Callable[[Any, Any, torch.Tensor], None], rows: Any, weights: Sequence[Any], N: int
) -> torch.Tensor:
    out = torch.empty(len(weights), N)
    pieces = rows.split(1) if rows.rows == len(weights) else [rows] * len(weights)
    for piece, weight, target in zip(pieces, weights, out.split(1), strict=True):
        linear(piece, weight, target)
    return out
