"""The GPU that a launch goes to, how many multiprocessors it has, and what it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

_HERE: AbstractContextManager[None] = nullcontext()


def device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Make the GPU of ``tensor`` the current one for a while; nothing to do if it is.

    Triton launches on the current one, whatever its tensors are on.
    """
    if tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


@lru_cache
def multiprocessors_of(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


@lru_cache
def runs_hopper_cuda(device: int) -> bool:
    """Whether this GPU has what the sources of ``kernels/cuda`` are written in, and their compiler
    is here."""
    from fusedmoe.kernels.cuda.program import missing_nvrtc

    return torch.cuda.get_device_capability(device)[0] == 9 and missing_nvrtc() is None
