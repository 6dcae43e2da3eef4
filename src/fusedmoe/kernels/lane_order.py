"""Columns in the order in which the lanes of a product hold nibbles.

Of 32 columns, lane t of four has word t: 8 nibbles, number j together with number j + 4. A WGMMA
wants columns 2t and 2t + 1 of every 8 of that lane. Device code: ``kernels/triton/lane_order.py``.
"""

from __future__ import annotations

import torch

LANE_COLUMNS = 32  # that change places among each other


def lane_order(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[r, 32 b + 8 j + 2 t + h] = x[r, 32 b + 8 t + 4 h + j], for t and j < 4, h < 2.

    x [T, H] with dense rows, out [T, H] contiguous in x's dtype, H a multiple of 32. Raises
    ValueError where they are not.
    """
    T, H = x.shape
    if H % LANE_COLUMNS:
        raise ValueError(f"rows of a multiple of {LANE_COLUMNS} columns are reordered, not {H}")
    if out.shape != (T, H) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, expected {(T, H)} {x.dtype}")
    if x.stride(1) != 1:
        raise ValueError(f"rows of x must be dense, its strides are {x.stride()}")
    if not x.is_cuda:
        return lane_order_reference(x, out)
    from fusedmoe.kernels.triton.lane_order import launch

    launch(x, out)
    return out


def lane_order_reference(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch."""
    words = x.unflatten(1, (-1, 4, 2, 4))
    return out.copy_(words.permute(0, 1, 4, 2, 3).flatten(1))
