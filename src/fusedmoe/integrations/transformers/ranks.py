"""Blocks of a Transformers model whose experts are spread over the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fusedmoe.config import FusedMoEParallelConfig, ParallelGroups, ParallelPlace
from fusedmoe.runner.reduction import RankSum
from fusedmoe.weights.expert_map import ExpertMapManager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fusedmoe.integrations.transformers.borrowed import ExpertWeights


@dataclass(frozen=True)
class BlockRanks:
    """How a block is spread: the groups it talks over, its place in them, and what it adds up."""

    groups: ParallelGroups
    parallel: FusedMoEParallelConfig
    rank_sum: RankSum

    @classmethod
    def make(cls, ep_group: ProcessGroup | DeviceMesh, same_tokens: bool) -> BlockRanks:
        """``same_tokens``: every rank runs the whole batch; else each has a batch of its own."""
        group = ParallelGroups.process_group(ep_group)
        nothing: dict[str, int | None] = dict.fromkeys(("tp", "dp", "pcp"))
        if same_tokens:
            groups = ParallelGroups(tp=group, enable_expert_parallel=True)
        else:
            groups = ParallelGroups(dp=group, ep=group, enable_expert_parallel=True)
        place = ParallelPlace.of(groups, nothing, nothing)
        parallel = FusedMoEParallelConfig.make(place.tp_size, 1, place.dp_size, 1, place)
        return cls(groups, parallel, RankSum(place.tp_size, place.tp_rank, groups.tp))  # type: ignore[arg-type]

    def place(self, num_experts: int) -> ExpertMapManager:
        return ExpertMapManager(num_experts, 0, self.parallel.ep_size, self.parallel.ep_rank)


@dataclass(frozen=True)
class RankWeights:
    """The rows [first, last) of a block's experts: views of all of them."""

    weights: ExpertWeights
    first: int
    last: int

    @classmethod
    def of(cls, weights: ExpertWeights, placed: ExpertMapManager) -> RankWeights:
        """This rank's experts, which follow each other in a linear placement."""
        rows = [e for e in range(placed.global_num_experts) if placed.local_row(e) >= 0]
        first = rows[0] if rows else 0
        return cls(weights, first, first + len(rows))

    def w13(self) -> torch.Tensor:
        return self.weights.w13()[self.first : self.last]

    def w2(self) -> torch.Tensor:
        return self.weights.w2()[self.first : self.last]

    def w13_bias(self) -> torch.Tensor | None:
        return self._cut(self.weights.w13_bias())

    def w2_bias(self) -> torch.Tensor | None:
        return self._cut(self.weights.w2_bias())

    def _cut(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else bias[self.first : self.last]
