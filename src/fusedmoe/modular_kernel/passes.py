"""The rows of one forward, a pass of the experts at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fusedmoe.kernels.peer_all_to_all import settled
from fusedmoe.modular_kernel.records import ExpertTokensMetadata, PrepareResult


class Pass(NamedTuple):
    """The rows that the experts run at once."""

    output: torch.Tensor
    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    scale: torch.Tensor | None
    expert_tokens_meta: ExpertTokensMetadata | None


def passes(prepared: PrepareResult, output: torch.Tensor, rows_per_pass: int) -> Iterator[Pass]:
    """All rows at once where they fit, else ``rows_per_pass`` at a time."""
    x, weights, ids = prepared.hidden_states, prepared.topk_weights, prepared.topk_ids
    assert weights is not None
    assert ids is not None
    size = x.shape[-2]
    if rows_per_pass >= size:
        yield Pass(output, x, weights, ids, prepared.scale, prepared.expert_tokens_meta)
        return
    x = settled(x)
    for start in range(0, size, rows_per_pass):
        part = slice(start, start + rows_per_pass)
        scale = _rows_of_scale(prepared.scale, part, size)
        yield Pass(output[part], x[part], weights[part], ids[part], scale, None)


def _rows_of_scale(scale: torch.Tensor | None, part: slice, rows: int) -> torch.Tensor | None:
    """Per-row scales are cut with their rows; a scale for the whole tensor is not."""
    if scale is None or scale.dim() == 0 or scale.shape[0] != rows or scale.numel() == 1:
        return scale
    return scale[part]
