"""Rows of activations rounded to any format and multiplied back: what emulated products take.

The definition is ``quantization.activations.fake_quantize``. Device code:
``kernels/triton/round_rows.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.column_orders import REPEATS, ordered
from fusedmoe.kernels.quantize import check_rounding, live_rows
from fusedmoe.quantization.activations import fake_quantize, quantize_activation
from fusedmoe.quantization.keys import PER_TENSOR, QuantKey

ELEMENTS: dict[torch.dtype | str, str] = {
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "int8",
    "mxfp8": "e4m3",
    "mxfp4": "e2m1",
    "nvfp4": "e2m1",
    "mxfp6_e3m2": "e3m2",
    "mxfp6_e2m3": "e2m3",
}


def round_rows(
    x: torch.Tensor,
    key: QuantKey,
    scale: torch.Tensor | None = None,
    *,
    order: str = "",
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
) -> torch.Tensor:
    """x [rows, D], 16 or 32 bits, as it is after rounding to ``key``: the same shape and dtype, of
    which numbers rounded past its largest become that.

    ``scale`` fp32 [1] belongs to a static key. ``order``: of the columns (``column_orders``). With
    a dynamic scale for the whole tensor, rows whose id in ``topk_ids`` [rows] names no expert of
    ``num_local_experts`` (after ``expert_map``) do not count, and mean nothing afterwards. Raises
    ValueError for keys of other elements and for groups that are no power of two of columns.
    """
    _check(x, key, scale, order, topk_ids)
    if scale is None and key.group_shape == PER_TENSOR:
        x = live_rows(x, topk_ids, expert_map, num_local_experts)
        if x.is_cuda:
            _, scale = quantize_activation(x, key)
    if not x.is_cuda:
        return round_rows_reference(x, key, scale, order=order)
    from fusedmoe.kernels.triton.round_rows import launch

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    e8m0 = key.scale_kind == "e8m0"
    launch(x, out, scale, ELEMENTS[key.dtype], max(0, key.group_shape.col), e8m0, order)
    return out


def round_rows_reference(
    x: torch.Tensor, key: QuantKey, scale: torch.Tensor | None = None, *, order: str = ""
) -> torch.Tensor:
    """The definition, in plain torch."""
    most = torch.finfo(x.dtype).max
    rounded = fake_quantize(x, key, scale).clamp(-most, most).to(x.dtype)
    return ordered(rounded, order)


def _check(
    x: torch.Tensor,
    key: QuantKey,
    scale: torch.Tensor | None,
    order: str,
    topk_ids: torch.Tensor | None,
) -> None:
    if x.dim() != 2 or x.shape[1] % REPEATS[order]:
        raise ValueError(
            f"x must be [rows, D], D a multiple of {REPEATS[order]}, got {tuple(x.shape)}"
        )
    if key.dtype not in ELEMENTS:
        raise ValueError(f"rows are rounded to {', '.join(map(str, ELEMENTS))}, not {key}")
    check_rounding(x, key, scale, topk_ids)
