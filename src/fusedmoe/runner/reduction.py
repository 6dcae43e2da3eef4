"""Sums over ranks: what a tensor still lacks is part of its type here, not a set of flags."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusedmoe.distributed.collectives import (
    all_gather_rows,
    gather_counts,
    may_ask_ranks,
    sum_in_order,
)
from fusedmoe.distributed.groups import TokenRanks
from fusedmoe.parallel_config import ParallelGroups, ParallelPlace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Extent(Enum):
    """How much of a sum over ranks a tensor holds."""

    WHOLE = "whole"  # the sum, on every rank
    PARTIAL = "partial"  # one rank's summand


@dataclass(frozen=True)
class Summand:
    """A tensor [T, H] and how much of the layer's output it is."""

    value: torch.Tensor
    extent: Extent

    def with_value(self, value: torch.Tensor) -> Summand:
        return Summand(value, self.extent)


@dataclass(frozen=True)
class RankSum:
    """The ranks whose results add up to the layer's output.

    Without a ``group`` (sizes given for loading alone), or with ``enabled`` False (the caller
    sums), nothing is communicated and a PARTIAL stays one: adding the ranks' results then gives
    the output, so what is whole on every rank is added on rank 0 alone.

    ``in_order``: ranks' summands are added in fp32 one after the other. A backend's own all-reduce
    moves less, but the order in which it adds an element's summands depends on where that lies.
    ``compares_counts``: ask first whether all ranks bring as many tokens, which share them.
    """

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    enabled: bool = True
    in_order: bool = False
    compares_counts: bool = False

    @classmethod
    def around(
        cls,
        place: ParallelPlace,
        groups: ParallelGroups,
        is_sequence_parallel: bool,
        *,
        enabled: bool = True,
    ) -> RankSum:
        """The ranks that hold the same tokens: what those with other tokens had has come back."""
        if not groups.connected:
            return cls(size=place.size, rank=place.rank, enabled=enabled)
        if is_sequence_parallel:
            return cls(enabled=enabled)
        group = ParallelGroups.process_group(groups.tp)
        return cls(size=place.tp_size, rank=place.tp_rank, group=group, enabled=enabled)

    @property
    def communicates(self) -> bool:
        return self.enabled and self.size > 1 and self.group is not None

    def partial(self, value: torch.Tensor) -> Summand:
        """One rank's result; on one rank that is all of it."""
        return Summand(value, Extent.PARTIAL if self.size > 1 else Extent.WHOLE)

    def reduced(self, summand: Summand) -> Summand:
        """The whole sum where ranks communicate, else ``summand``. May overwrite its tensor."""
        if summand.extent is Extent.WHOLE or not self.communicates:
            return summand
        value = summand.value.contiguous()
        if self.compares_counts and may_ask_ranks():
            self._check_counts(value.shape[0])
        if self.in_order:
            assert self.group is not None
            everyones = all_gather_rows(
                value, [value.shape[0]] * self.size, TokenRanks((self.group,))
            )
            parts = everyones().view(self.size, *value.shape)
            return Summand(sum_in_order(parts), Extent.WHOLE)
        torch.distributed.all_reduce(value, group=self.group)
        return Summand(value, Extent.WHOLE)

    def _check_counts(self, num_tokens: int) -> None:
        assert self.group is not None
        counts = gather_counts(num_tokens, TokenRanks((self.group,)))
        if len(set(counts)) > 1:
            raise ValueError(f"tensor-parallel ranks share their tokens, but bring {counts}")

    def add(self, left: Summand, right: Summand) -> Summand:
        """left + right with one communication at most. May overwrite ``left``, never ``right``."""
        if left.extent is right.extent:
            return left.with_value(left.value + right.value)
        if self.communicates:
            if right.extent is Extent.PARTIAL:
                right = self.reduced(right.with_value(right.value.clone()))
            return Summand(self.reduced(left).value + right.value, Extent.WHOLE)
        whole, partial = (left, right) if left.extent is Extent.WHOLE else (right, left)
        return partial if self.rank else partial.with_value(partial.value + whole.value)

    def plus_whole(self, summand: Summand, term: torch.Tensor) -> Summand:
        """summand + term fp32 [T, H], which every rank has whole; rounded once."""
        if summand.extent is Extent.PARTIAL and self.rank:
            return summand
        value = summand.value
        wide = torch.promote_types(value.dtype, term.dtype)
        return summand.with_value((value.to(wide) + term).to(value.dtype))


def commutes_with_sum(transform: nn.Module | None) -> bool:
    """Whether transforming summands and adding equals adding and transforming.

    Known for a linear layer without bias; any other module may say so by ``is_linear = True``.
    """
    if transform is None or isinstance(transform, nn.Identity):
        return True
    if isinstance(transform, nn.Linear):
        return transform.bias is None
    return bool(getattr(transform, "is_linear", False))
