"""BuiltKernel: the kernel of one layer, and for which weights it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.modular_kernel import FusedMoEKernel, FusedMoEMonolithicKernel


@dataclass
class BuiltKernel:
    """A kernel and what it was built for; ``tensors`` are those its quant config holds.

    ``prepacked``: it has seen the weights in their final state.
    """

    kernel: FusedMoEKernel | FusedMoEMonolithicKernel
    device: torch.device
    dtype: torch.dtype
    tensors: tuple[torch.Tensor | None, ...]
    prepacked: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy prepacks weights of its own."""
        return vars(self) | {"prepacked": False}

    def fits(self, weight: torch.Tensor, tensors: tuple[torch.Tensor | None, ...]) -> bool:
        """Whether it was made for a weight like this one and these very tensors."""
        return (
            self.device == weight.device
            and self.dtype == weight.dtype
            and all(mine is theirs for mine, theirs in zip(self.tensors, tensors, strict=True))
        )
