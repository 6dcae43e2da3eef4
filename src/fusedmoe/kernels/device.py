"""The GPU that a Triton launch goes to is the current one, whatever its tensors are on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_HERE: AbstractContextManager[None] = nullcontext()


def device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Make the GPU of ``tensor`` the current one for a while; nothing to do if it is."""
    if tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)
