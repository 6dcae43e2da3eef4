"""Forwards that no gradient passes, in eager and in compiled code alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def without_gradients(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """``function`` with gradients off.

    A compiler that sees a tensor with gradients enter an operator that has no backward pass would
    refuse the whole program, whether or not anybody wants gradients of it.
    """

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
