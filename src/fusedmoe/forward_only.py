"""Forwards that heed neither gradients nor autocast, in eager and in compiled code alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def forward_only(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """``function`` with gradients and autocast off.

    A compiler that sees a tensor with gradients enter an operator that has no backward pass would
    refuse the whole program, whether or not anybody wants gradients of it. Autocast would round
    some sums on the way, and not those that kernels make: dtypes are what the tensors have.
    """

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return call(*args, **kwargs)
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call
