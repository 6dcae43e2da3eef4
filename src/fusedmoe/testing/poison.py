"""NaN in unwritten memory, so that reading it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_UNWRITTEN = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_permuted,
        torch.empty_strided,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }
)


class _NanPoison(TorchFunctionMode):
    """A mode replaces no function of torch: some are looked up once and remembered for good, by
    ``torch.device`` as a context among others."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _UNWRITTEN and result.is_floating_point():
            with torch.no_grad():
                result.fill_(float("nan"))
        return result


@contextmanager
def nan_poison() -> Iterator[None]:
    """Inside, ``torch.empty`` and its relatives return NaN for floating-point dtypes.

    Integers are left alone, and so is what compiled code and the bodies of custom ops allocate.
    """
    with _NanPoison():
        yield
