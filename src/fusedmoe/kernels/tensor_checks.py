"""What launchers ask of the tensors they are given, before a kernel runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

Expected = tuple[str, torch.Tensor | None, tuple[int, ...], torch.dtype]


def check_tensors(expected: Iterable[Expected]) -> None:
    """Raise ValueError for the first (name, tensor, shape, dtype) that is there and differs."""
    for name, tensor, shape, dtype in expected:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}"
            )


def check_contiguous(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError for the first tensor that is there and not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")
