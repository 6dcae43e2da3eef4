"""Blocks of a Transformers model whose experts are spread over the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from fusedmoe.config import FusedMoEConfig, FusedMoEParallelConfig, ParallelGroups, ParallelPlace
from fusedmoe.distributed.agreement import check_agreement, failures_told
from fusedmoe.runner.reduction import RankSum
from fusedmoe.weights.expert_map import ExpertMapManager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fusedmoe.distributed.peer_memory import PeerMemory
    from fusedmoe.integrations.transformers.borrowed import ExpertWeights

Made = TypeVar("Made")


@dataclass(frozen=True)
class BlockRanks:
    """How a block is spread: the groups it talks over, its place in them, and what it adds up."""

    groups: ParallelGroups
    parallel: FusedMoEParallelConfig
    rank_sum: RankSum

    @classmethod
    def make(
        cls,
        ep_group: ProcessGroup | DeviceMesh | None,
        same_tokens: bool,
        peers: PeerMemory | None = None,
    ) -> BlockRanks | None:
        """``same_tokens``: every rank runs the whole batch; else each has a batch of its own, which
        may go through ``peers``. None without a group.

        Raises ValueError for ``peers`` that nothing would go through.
        """
        if peers is not None and (ep_group is None or same_tokens):
            raise ValueError(
                "peers move tokens between the ranks of an ep_group whose batches differ"
            )
        group = ParallelGroups.process_group(ep_group)
        if group is None:
            return None
        if same_tokens:
            groups = ParallelGroups(tp=group, enable_expert_parallel=True)
        else:
            groups = ParallelGroups(dp=group, ep=group, enable_expert_parallel=True, peers=peers)
        place = ParallelPlace.of(groups)
        parallel = FusedMoEParallelConfig.around(place, groups, False)
        return cls(groups, parallel, RankSum.around(place, groups, False))

    def place(self, num_experts: int) -> ExpertMapManager:
        return ExpertMapManager(num_experts, 0, self.parallel.ep_size, self.parallel.ep_rank)

    def own_experts(self, num_experts: int) -> range:
        """This rank's experts, which follow each other in a linear placement."""
        placed = self.place(num_experts)
        own = [e for e in range(num_experts) if placed.local_row(e) >= 0]
        return range(own[0], own[-1] + 1) if own else range(0)

    def share(self, config: FusedMoEConfig) -> tuple[ExpertMapManager, FusedMoEConfig]:
        """Which rank has which expert of a block, and ``config`` for the experts of this rank."""
        placed = self.place(config.num_experts)
        own = {"num_local_experts": placed.num_local_experts, "moe_parallel_config": self.parallel}
        return placed, replace(config, **own)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RankWeights:
    """One rank's share of a block's experts, as views of the tensors of all of them."""

    weights: ExpertWeights
    own: slice

    def w13(self) -> torch.Tensor:
        return self.weights.w13()[self.own]

    def w2(self) -> torch.Tensor:
        return self.weights.w2()[self.own]

    def w13_bias(self) -> torch.Tensor | None:
        return self._cut(self.weights.w13_bias())

    def w2_bias(self) -> torch.Tensor | None:
        return self._cut(self.weights.w2_bias())

    def _cut(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else bias[self.own]


def make_together(
    ranks: BlockRanks, make: Callable[[], Made], facts_of: Callable[[Made], Mapping[str, str]]
) -> Made:
    """The result of ``make``, which must not communicate, if it succeeds on all ranks with equal
    facts.

    A rank that fails raises its own error; the others, which would wait for it in the first
    forward, raise RanksDisagreeError.
    """
    with failures_told(ranks.groups, "the model"):
        made = make()
    check_agreement(facts_of(made), ranks.groups, "the model")
    return made
