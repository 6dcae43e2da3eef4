"""NaN in memory that nobody wrote, so that reading it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PLACES: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextmanager
def nan_poison() -> Iterator[None]:
    """Inside, ``torch.empty`` and its relatives return NaN for floating-point dtypes.

    Integers are left alone. Not for code that is compiled or captured inside the block.
    """
    originals = [(owner, name, getattr(owner, name)) for owner, name in _PLACES]
    try:
        for owner, name, function in originals:
            setattr(owner, name, _poisoned(function))
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = function(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate
