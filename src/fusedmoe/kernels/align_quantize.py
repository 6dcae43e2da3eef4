"""Grouping routed slots by expert and rounding the tokens' rows, which wait for nothing of each
other, in one launch. Device code: ``kernels/triton/align_quantize.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.kernels.align import MoEAlignment, align_local_slots, dense, padded_slots
from fusedmoe.kernels.quantize import QuantizedRows, quantize_rows, room_for_rows
from fusedmoe.quantization.keys import PER_TENSOR, QuantKey

ONE_LAUNCH_SLOTS = 2048


class AlignedRows(NamedTuple):
    """``alignment`` of slots, ``rows`` of tokens, ``largest`` zeros int32 [T, K] or None."""

    alignment: MoEAlignment
    rows: QuantizedRows
    largest: torch.Tensor | None


def align_and_quantize(
    topk_ids: torch.Tensor,
    block_size: int,
    expert_map: torch.Tensor | None,
    num_local_experts: int,
    x: torch.Tensor | QuantizedRows,
    key: QuantKey,
    scale: torch.Tensor | None = None,
    *,
    with_largest: bool = False,
) -> AlignedRows:
    """``align_local_slots``, and ``quantize_rows`` of x [T, D] unless it was rounded before.

    ``with_largest``: also room for the largest magnitude of each slot's row, to be raised from
    zero. One launch for at most ONE_LAUNCH_SLOTS slots and scales that are given or that a row's
    own values decide.
    """
    if isinstance(x, QuantizedRows) or not _takes_one_launch(topk_ids, x, key):
        alignment = align_local_slots(topk_ids, block_size, num_local_experts, expert_map)
        rows = x if isinstance(x, QuantizedRows) else quantize_rows(x, key, scale)
        largest = topk_ids.new_zeros(topk_ids.shape, dtype=torch.int32) if with_largest else None
        return AlignedRows(alignment, rows, largest)
    from fusedmoe.kernels.triton.align_quantize import align_and_quantize as launch

    P = padded_slots(topk_ids.numel(), block_size, num_local_experts, False)
    tables = MoEAlignment.empty(P, block_size, x.device)
    group = -1 if key.static else max(key.group_shape.col, 0)
    rows = room_for_rows(x, key, scale)
    largest = torch.empty_like(topk_ids, dtype=torch.int32) if with_largest else None
    launch(
        topk_ids, tables, block_size, num_local_experts, dense(expert_map), x, *rows, group,
        key.scale_kind == "e8m0", largest,
    )  # fmt: skip
    return AlignedRows(tables, rows, largest)


def _takes_one_launch(topk_ids: torch.Tensor, x: torch.Tensor, key: QuantKey) -> bool:
    few = 0 < topk_ids.numel() <= ONE_LAUNCH_SLOTS and topk_ids.shape[0] == x.shape[0]
    known = key.static or key.group_shape != PER_TENSOR
    return x.is_cuda and few and known and topk_ids.is_contiguous()
