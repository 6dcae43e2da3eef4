"""Experts that a model had removed: whoever is routed to one gets a constant vector instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class SubstitutedRouting(NamedTuple):
    """Weights fp32 and ids [T, K] of the experts that are left, -1 with weight 0 for the others;
    ``term`` fp32 [T, H]: what the removed ones add to the routed output."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    term: torch.Tensor


class ExpertSubstitution(nn.Module):
    """Constant vectors in the place of experts that a model had removed.

    The router still scores all ``num_experts`` (E); those in ``removed`` (R ids) are gone.
    ``constants`` float [R, H]: what each removed expert gives whatever the token is, times the
    token's weight for it. The weights are not renormalized. The experts that are left are stored,
    and named in checkpoints, without gaps: 0 .. E - R - 1 in the order of their ids.

    Raises ValueError for ids that are not of the model or stand twice, and for constants of another
    shape or with NaN or infinity in them.
    """

    compact_ids: torch.Tensor
    constant_rows: torch.Tensor

    def __init__(self, num_experts: int, removed: Sequence[int], constants: torch.Tensor) -> None:
        super().__init__()
        removed = tuple(removed)
        gone = set(removed)
        if len(gone) != len(removed) or not gone <= set(range(num_experts)):
            raise ValueError(
                f"removed experts {list(removed)} are not different ids in [0, {num_experts})"
            )
        if not removed or len(removed) == num_experts:
            raise ValueError(f"{len(removed)} of {num_experts} experts are removed")
        if constants.dim() != 2 or constants.shape[0] != len(removed):
            raise ValueError(f"constants must be [{len(removed)}, H], got {tuple(constants.shape)}")
        if constants.is_meta or not constants.is_floating_point():
            raise ValueError(f"constants must be numbers, got {constants.dtype} {constants.device}")
        if not bool(constants.isfinite().all()):
            bad = int((~constants.isfinite()).sum())
            raise ValueError(f"{bad} of {constants.numel()} constants are not finite")
        left = iter(range(num_experts))
        self._tables = {
            "compact_ids": [-1 if e in gone else next(left) for e in range(num_experts)],
            "constant_rows": [
                removed.index(e) if e in gone else len(removed) for e in range(num_experts)
            ],
        }
        self.num_experts = num_experts
        self.removed = removed
        self.constants = nn.Parameter(constants.float(), requires_grad=False)
        for name, table in self._tables.items():
            buffer = torch.tensor(table, device=constants.device)
            self.register_buffer(name, buffer, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        for name, table in self._tables.items():  # to_empty() leaves them without their values
            buffer = getattr(self, name)
            if not buffer.is_meta:
                buffer.copy_(torch.tensor(table, device="cpu"))
        return result

    @property
    def num_left(self) -> int:
        """Experts that have weights: E - R."""
        return self.num_experts - len(self.removed)

    def left_of(self, num_experts: int, hidden_size: int, beside: dict[str, bool]) -> int:
        """``num_left``, for a layer of these sizes.

        Raises ValueError for a layer of other sizes, and where any of ``beside`` is True: these
        features do not go with a substitution.
        """
        given = [name for name, is_given in beside.items() if is_given]
        if given:
            raise ValueError(f"expert_substitution and {', '.join(given)} exclude each other")
        own_size = self.constants.shape[1]
        if (self.num_experts, own_size) != (num_experts, hidden_size):
            raise ValueError(
                f"expert_substitution is for {self.num_experts} experts of hidden size {own_size}, "
                f"the layer has {num_experts} of {hidden_size}"
            )
        return self.num_left

    def forward(self, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> SubstitutedRouting:
        """Weights fp32 and ids int [T, K] as the router chose them; ValueError for other shapes."""
        if topk_ids.dim() != 2 or topk_weights.shape != topk_ids.shape:
            raise ValueError(
                f"topk_weights and topk_ids must be [T, K], got {tuple(topk_weights.shape)} and "
                f"{tuple(topk_ids.shape)}"
            )
        R = len(self.removed)
        known = (topk_ids >= 0) & (topk_ids < self.num_experts)
        index = topk_ids.clamp(0, self.num_experts - 1).long()
        row = self.constant_rows[index].masked_fill(~known, R)
        picked = row[:, :, None] == torch.arange(R, device=row.device)
        share = (picked * topk_weights.float()[:, :, None]).sum(1)
        ids = torch.where(known, self.compact_ids[index].to(topk_ids.dtype), topk_ids)
        return SubstitutedRouting(
            topk_weights.masked_fill(ids < 0, 0.0), ids, share @ self.constants.float()
        )

    def extra_repr(self) -> str:
        return f"removed={list(self.removed)} of {self.num_experts}"
