"""Scales of GGUF's superblocks with minima (q4_k, q5_k) as numbers of their groups.

For kernels that take them from tensors: a quarter of a byte for each weight, made for one product.
Triton body: ``kernels/triton/superblock_scales.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.formats.superblocks import CODECS, scales_and_minima
from fusedmoe.quantization.tensor import QuantizedTensor

GROUP = 32  # columns
ADDED = 128  # to the integers that these scales multiply
_ELEMENTS = ("q4_k", "q5_k")


def superblock_scales(w: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, term) of w [e, N, D], fp32 [e, N, D / 32]: value = (integer + ADDED) * scale + term.

    Raises ValueError for other formats and for data that is not contiguous.
    """
    if w.format.element not in _ELEMENTS:
        raise ValueError(f"{w.format.name} has no superblocks with minima")
    if not w.data.is_contiguous():
        raise ValueError(f"superblocks must be contiguous, their strides are {w.data.stride()}")
    if not w.data.is_cuda:
        return superblock_scales_reference(w)
    from fusedmoe.kernels.triton.superblock_scales import launch

    *lead, D = w.shape
    scale = torch.empty(*lead, D // GROUP, dtype=torch.float32, device=w.data.device)
    term = torch.empty_like(scale)
    launch(w.data, scale, term, CODECS[w.format.element].nbytes)
    return scale, term


def superblock_scales_reference(w: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain torch."""
    blocks = w.data.unflatten(-1, (-1, CODECS[w.format.element].nbytes))
    scale, least = scales_and_minima(blocks, torch.float32)
    return scale.flatten(-2), (-least - ADDED * scale).flatten(-2)
