"""The plainest read of a tensor, for measuring what memory gives: one maximum per block of words.

Triton body: ``kernels/triton/read_all.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 8192
_LOWEST = -(2**31)


def read_all(source: torch.Tensor) -> torch.Tensor:
    """Contiguous tensor of n 4-byte words -> int32 [cdiv(n, 8192)], the largest word of each block.

    Raises ValueError for other tensors.
    """
    if source.element_size() != 4 or not source.is_contiguous() or source.numel() == 0:
        raise ValueError(
            f"read_all reads contiguous 4-byte words, got {source.dtype} {tuple(source.shape)} "
            f"with strides {source.stride()}"
        )
    words = source.view(torch.int32).view(-1)
    if not source.is_cuda:
        return read_all_reference(words)
    from fusedmoe.kernels.triton.read_all import read_all as launch

    found = torch.empty(-(-words.numel() // BLOCK), dtype=torch.int32, device=source.device)
    launch(words, found, BLOCK)
    return found


def read_all_reference(words: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch."""
    padded = F.pad(words, (0, -words.numel() % BLOCK), value=_LOWEST)
    return padded.view(-1, BLOCK).amax(dim=1)
