"""The rows of one forward, a pass of the experts at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusedmoe.kernels.peer_all_to_all import settled
from fusedmoe.modular_kernel.records import ExpertsWork


def passes(work: ExpertsWork, rows_per_pass: int) -> Iterator[ExpertsWork]:
    """All rows at once where they fit, else ``rows_per_pass`` at a time, the output cut likewise.

    It begins with a dimension of rows [M, ...] or of their slots [M * K, ...].
    """
    size = work.hidden_states.shape[-2]
    if rows_per_pass >= size:
        yield work
        return
    x, slots = settled(work.hidden_states), work.output.shape[0] // size
    for start in range(0, size, rows_per_pass):
        part = slice(start, start + rows_per_pass)
        yield work._replace(
            output=work.output[part.start * slots : part.stop * slots],
            hidden_states=x[part],
            topk_weights=work.topk_weights[part],
            topk_ids=work.topk_ids[part],
            a1q_scale=_rows_of_scale(work.a1q_scale, part, size),
            expert_tokens_meta=None,
        )


def _rows_of_scale(scale: torch.Tensor | None, part: slice, rows: int) -> torch.Tensor | None:
    """Per-row scales are cut with their rows; a scale for the whole tensor is not."""
    if scale is None or scale.dim() == 0 or scale.shape[0] != rows or scale.numel() == 1:
        return scale
    return scale[part]
