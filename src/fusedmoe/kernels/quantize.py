"""Rows of activations to fp8 (e4m3) or int8 in one launch, with the scales their values ask for.

The definition is ``quantization.activations.quantize_activation``; where x / scale lies within
rounding of a tie the kernel may take the other neighbour. Device code:
``kernels/triton/quantize.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.kernels.ids import local_ids
from fusedmoe.quantization.activations import quantize_activation
from fusedmoe.quantization.keys import PER_TENSOR, QuantKey

STORED: dict[torch.dtype | str, torch.dtype] = {
    torch.float8_e4m3fn: torch.float8_e4m3fn,
    "mxfp8": torch.float8_e4m3fn,
    torch.int8: torch.int8,
}


class QuantizedRows(NamedTuple):
    """``data`` [rows, D] of a key's dtype, ``scale`` fp32 [rows, groups], [rows, 1] or [1]."""

    data: torch.Tensor
    scale: torch.Tensor


def room_for_rows(
    x: torch.Tensor, key: QuantKey, scale: torch.Tensor | None = None
) -> QuantizedRows:
    """What ``quantize_rows`` of a key without a scale of all rows, or with a given one, writes."""
    (rows, D), group = x.shape, key.group_shape.col
    q = torch.empty(rows, D, dtype=STORED[key.dtype], device=x.device)
    if scale is None:
        groups = 1 if group == -1 else -(-D // group)
        scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    return QuantizedRows(q, scale)


def quantize_rows(
    x: torch.Tensor,
    key: QuantKey,
    scale: torch.Tensor | None = None,
    *,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
    beside: QuantizedRows | None = None,
) -> QuantizedRows:
    """x [rows, D] -> q [rows, D] of the key's dtype, scale fp32 [rows, groups] or [1].

    ``scale`` fp32 [1] belongs to a static key and is returned. With a dynamic scale for the whole
    tensor, rows whose id in ``topk_ids`` [rows] names no expert of ``num_local_experts`` (after
    ``expert_map``) do not count; q of such rows means nothing. ``beside``: room, had before the
    alignment of the rows' slots was launched, to round them beside its last launch. Raises
    ValueError for keys of other elements than fp8 and int8, and for groups that are not a power of
    two of columns.
    """
    _check(x, key, scale, topk_ids)
    if not x.is_cuda:
        return quantize_rows_reference(
            x,
            key,
            scale,
            topk_ids=topk_ids,
            expert_map=expert_map,
            num_local_experts=num_local_experts,
        )
    from fusedmoe.kernels.triton.quantize import quantize

    if scale is None and key.group_shape == PER_TENSOR:
        live = live_rows(x, topk_ids, expert_map, num_local_experts)
        _, scale = quantize_activation(live, key)
    room = beside or room_for_rows(x, key, scale)
    group = None if key.group_shape.col == -1 else key.group_shape.col
    e8m0 = key.scale_kind == "e8m0"
    quantize(x, *room, group, e8m0, scale is not None, beside is not None)
    return room


def quantize_rows_reference(
    x: torch.Tensor,
    key: QuantKey,
    scale: torch.Tensor | None = None,
    *,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
) -> QuantizedRows:
    """The definition, in plain torch."""
    if scale is None and key.group_shape == PER_TENSOR:
        x = live_rows(x, topk_ids, expert_map, num_local_experts)
    elements, found = quantize_activation(x, key, scale)
    if key.dtype == torch.int8:
        elements = elements.nan_to_num(nan=0.0)
    return QuantizedRows(elements.to(STORED[key.dtype]), found)


def live_rows(
    x: torch.Tensor,
    topk_ids: torch.Tensor | None,
    expert_map: torch.Tensor | None = None,
    num_local_experts: int | None = None,
) -> torch.Tensor:
    """x with the rows of no expert set to zero."""
    if topk_ids is None:
        return x
    most = torch.iinfo(torch.int32).max if num_local_experts is None else num_local_experts
    dead = local_ids(topk_ids.reshape(-1), most, expert_map) < 0
    return x.masked_fill(dead[:, None], 0.0)


def _check(
    x: torch.Tensor, key: QuantKey, scale: torch.Tensor | None, topk_ids: torch.Tensor | None
) -> None:
    if key.dtype not in STORED:
        raise ValueError(f"rows are quantized to fp8 or int8, not {key}")
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, D], got {tuple(x.shape)}")
    check_rounding(x, key, scale, topk_ids)


def check_rounding(
    x: torch.Tensor, key: QuantKey, scale: torch.Tensor | None, topk_ids: torch.Tensor | None
) -> None:
    """Raise ValueError where the key's groups, its scale or the ids of rows [rows, D] are others
    than kernels take."""
    group = key.group_shape.col
    if group != -1 and (group < 1 or group & (group - 1)):
        raise ValueError(f"a group must be a power of two of columns, got {group}")
    if key.static != (scale is not None) or (scale is not None and scale.numel() != 1):
        found = "none" if scale is None else f"{tuple(scale.shape)}"
        raise ValueError(f"activations {key}: one scale belongs to a static key, got {found}")
    if topk_ids is not None and topk_ids.numel() != x.shape[0]:
        raise ValueError(f"{topk_ids.numel()} ids do not name the {x.shape[0]} rows of x")
