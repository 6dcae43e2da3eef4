"""Which rank holds which expert: placement as pure functions, and the tables made of it.

Ids are *global* (what the router emits: logical experts first, redundant copies after them),
*local* (the row of a rank's weights) or *physical* (all ranks' rows one after the other).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

Placement = Literal["linear", "round_robin"]


class ExpertCounts(NamedTuple):
    """``physical`` experts over all ranks, of which ``logical`` are distinct; ``fused_shared`` of
    the logical ones are shared experts that every token is routed to."""

    physical: int
    logical: int
    fused_shared: int


class ExpertMapResult(NamedTuple):
    """``expert_map`` int32 [global]: local row or -1 (None on one rank); ``expert_mask`` int32
    [global + fused shared + 1]: 1 where local, the last always 0 (None unless asked for)."""

    num_local_experts: int
    expert_map: torch.Tensor | None
    expert_mask: torch.Tensor | None


def determine_expert_counts(
    num_experts: int,
    num_redundant_experts: int = 0,
    n_shared_experts: int | None = None,
    fuse_shared_experts: bool = True,
) -> ExpertCounts:
    """The experts a layer stores, from those the model names."""
    shared = (n_shared_experts or 0) if fuse_shared_experts else 0
    if num_experts < 1 or num_redundant_experts < 0 or shared < 0:
        raise ValueError(
            f"num_experts {num_experts} must be at least 1; num_redundant_experts "
            f"{num_redundant_experts} and n_shared_experts {shared} at least 0"
        )
    logical = num_experts + shared
    return ExpertCounts(logical + num_redundant_experts, logical, shared)


def experts_of_rank(
    ep_size: int, ep_rank: int, global_num_experts: int, strategy: Placement = "linear"
) -> list[int]:
    """Global ids on one rank, in the order of its rows.

    linear: consecutive ids, the first ``global % ep`` ranks one more; round_robin: every ep-th.
    """
    if ep_size < 1 or not 0 <= ep_rank < ep_size:
        raise ValueError(f"ep_rank {ep_rank} does not lie in a group of ep_size {ep_size}")
    if strategy == "linear":
        base, extra = divmod(global_num_experts, ep_size)
        start = ep_rank * base + min(ep_rank, extra)
        return list(range(start, start + base + (ep_rank < extra)))
    if strategy == "round_robin":
        return list(range(ep_rank, global_num_experts, ep_size))
    raise ValueError(f"unknown expert placement {strategy!r}; known: linear, round_robin")


def determine_expert_map(
    ep_size: int,
    ep_rank: int,
    global_num_experts: int,
    strategy: Placement = "linear",
    num_fused_shared_experts: int = 0,
    return_expert_mask: bool = False,
) -> ExpertMapResult:
    """Place ``global_num_experts`` over the ranks; see ``experts_of_rank`` for the strategies.

    With ``return_expert_mask`` the map is continued by ``num_fused_shared_experts`` ids that
    every rank holds behind its routed experts.
    """
    local = experts_of_rank(ep_size, ep_rank, global_num_experts, strategy)
    if ep_size == 1:
        return ExpertMapResult(global_num_experts, None, None)
    row_of = {expert: row for row, expert in enumerate(local)}
    rows = [row_of.get(expert, -1) for expert in range(global_num_experts)]
    mask = None
    if return_expert_mask:
        rows += range(len(local), len(local) + num_fused_shared_experts)
        mask = _table([*(int(row >= 0) for row in rows), 0])
    expert_map = _table(rows)
    return ExpertMapResult(len(local), expert_map, mask)


def _table(values: list[int]) -> torch.Tensor:
    """int32 on the CPU, whatever torch's default device is at the moment (it may be "meta")."""
    return torch.tensor(values, dtype=torch.int32, device="cpu")


class RoutingTables(NamedTuple):
    """int32 tables: global id -> physical id [global], its inverse, and local row -> global id."""

    global_to_physical: torch.Tensor
    physical_to_global: torch.Tensor
    local_to_global: torch.Tensor


def make_routing_tables(
    ep_size: int, ep_rank: int, global_num_experts: int, strategy: Placement = "linear"
) -> RoutingTables:
    """Physical ids number the rows of rank 0, then those of rank 1, and so on."""
    physical_to_global = [
        expert
        for rank in range(ep_size)
        for expert in experts_of_rank(ep_size, rank, global_num_experts, strategy)
    ]
    physical_of = {expert: physical for physical, expert in enumerate(physical_to_global)}
    return RoutingTables(
        _table([physical_of[expert] for expert in range(global_num_experts)]),
        _table(physical_to_global),
        _table(experts_of_rank(ep_size, ep_rank, global_num_experts, strategy)),
    )


class ExpertMapManager:
    """The placement of one layer's experts and its tables, on the CPU.

    ``expert_map`` and ``routing_tables`` are None on one rank, where ids are rows. ``is_moving``:
    weights are on their way, and will be put over what is written meanwhile.
    """

    is_moving = False

    def __init__(
        self,
        global_num_experts: int,
        num_redundant_experts: int = 0,
        ep_size: int = 1,
        ep_rank: int = 0,
        strategy: Placement = "linear",
    ) -> None:
        if not 0 <= num_redundant_experts < global_num_experts:
            raise ValueError(
                f"{num_redundant_experts} redundant experts among {global_num_experts} leave none"
            )
        if strategy == "round_robin" and num_redundant_experts:
            raise ValueError(
                f"round_robin placement takes no redundant experts, got {num_redundant_experts}"
            )
        self.global_num_experts = global_num_experts
        self.num_logical_experts = global_num_experts - num_redundant_experts
        self.strategy = strategy
        self.update(ep_size, ep_rank)

    def update(self, ep_size: int, ep_rank: int) -> None:
        """Place the experts anew over another group of ranks."""
        self.num_local_experts, self.expert_map, _ = determine_expert_map(
            ep_size, ep_rank, self.global_num_experts, self.strategy
        )
        self.ep_size, self.ep_rank = ep_size, ep_rank
        self.routing_tables = (
            None
            if ep_size == 1
            else make_routing_tables(ep_size, ep_rank, self.global_num_experts, self.strategy)
        )
        local = experts_of_rank(ep_size, ep_rank, self.global_num_experts, self.strategy)
        self._row_of = {expert: row for row, expert in enumerate(local)}
        self.place([self._first_at(slot) for slot in range(self.global_num_experts)])

    def place(self, logical_ids: Sequence[int]) -> None:
        """Say which logical expert each global id stands for, now that balancing moved weights."""
        self._held, self.is_moving = list(logical_ids), False

    def _first_at(self, global_id: int) -> int:
        """Redundant ids behind the logical ones begin as copies of expert 0, 1, ... in turn."""
        return global_id % self.num_logical_experts

    def is_moved(self, global_id: int) -> bool:
        """Whether balancing has put another expert there than it began with."""
        self._check(global_id)
        return self._held[global_id] != self._first_at(global_id)

    def local_row(self, global_id: int) -> int:
        """The row of a global id on this rank, -1 where it lives elsewhere."""
        self._check(global_id)
        return self._row_of.get(global_id, -1)

    def _check(self, global_id: int) -> None:
        if not 0 <= global_id < self.global_num_experts:
            raise ValueError(
                f"expert id {global_id} does not lie in [0, {self.global_num_experts})"
            )

    def replicas(self, logical_id: int) -> list[int]:
        """Global ids of the copies of a logical expert, where they are now."""
        if not 0 <= logical_id < self.num_logical_experts:
            raise ValueError(
                f"expert id {logical_id} does not lie in [0, {self.num_logical_experts}) "
                "logical experts"
            )
        return [slot for slot, expert in enumerate(self._held) if expert == logical_id]
