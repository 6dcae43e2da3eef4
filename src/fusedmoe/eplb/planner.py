"""Which slots hold copies of which experts, from the load of the experts: a pure function."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedmoe.eplb.placement import Slots, experts_of_nodes, place_in_node
from fusedmoe.eplb.refine import EVEN_ENOUGH, refine


def rebalance_experts(
    load: torch.Tensor,
    num_physical: int,
    num_ranks: int,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
    previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plan which slot holds which expert: load [L, E] -> physical_to_logical int64 [L, P], CPU.

    ``load`` counts picks of logical experts; ``num_physical`` slots (P) are equally many on each
    rank. Where ``num_nodes`` divides ``num_groups``, groups of experts stay on one node each (what
    group-limited routing wants), else all ranks are treated alike. Beginning with the published
    placement, experts and copies are exchanged while that helps, so that no rank's load is above
    what that gives. With ``previous`` int [L, P], the placement now, that one is improved instead
    until it is as good (or within half a percent of even), if it can be, and what stays on a rank
    keeps its slot: fewer experts move. Integers and fp64 on the CPU alone: every rank that has the
    same load makes the same plan.

    Raises ValueError where the sizes do not divide, or a load is negative or not finite.
    """
    _check(load, num_physical, num_ranks, num_groups, num_nodes, previous)
    if num_groups % num_nodes:
        num_nodes = 1
    rows = []
    for layer, values in enumerate(load.double().cpu().tolist()):
        before = None
        if previous is not None:
            before = previous[layer].view(num_ranks, -1).tolist()
        slots = _place(values, num_physical, num_ranks, num_groups, num_nodes, before)
        if before is not None:
            slots = keep_slots(before, slots, num_ranks // num_nodes)
        rows.append([expert for one in slots for expert in one])
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(load.shape[0], num_physical)


def published_placement(
    load: Sequence[float], num_physical: int, num_ranks: int, num_groups: int, num_nodes: int
) -> list[Slots]:
    """DeepSeek's placement of one layer: for each node, the slots of its ranks. ``num_nodes``
    divides ``num_groups``."""
    return [
        place_in_node(load, experts, num_physical // num_nodes, num_ranks // num_nodes)
        for experts in experts_of_nodes(load, num_groups, num_nodes)
    ]


def _place(
    load: Sequence[float],
    num_physical: int,
    num_ranks: int,
    num_groups: int,
    num_nodes: int,
    before: Slots | None,
) -> Slots:
    published = published_placement(load, num_physical, num_ranks, num_groups, num_nodes)
    if before is not None and num_nodes == 1 and _holds_all(before, len(load)):
        mean = sum(load) / num_ranks
        good = max(_heaviest(published[0], load), EVEN_ENOUGH * mean)
        improved = refine(before, load, even=good / mean if mean > 0 else 1.0)
        if _heaviest(improved, load) <= good:
            return improved
    return [rank for node in published for rank in refine(node, load)]


def _holds_all(slots: Slots, num_experts: int) -> bool:
    return {expert for rank in slots for expert in rank} == set(range(num_experts))


def _heaviest(slots: Slots, load: Sequence[float]) -> float:
    count = [0] * len(load)
    for rank in slots:
        for expert in rank:
            count[expert] += 1
    return max(sum(load[expert] / count[expert] for expert in rank) for rank in slots)


def keep_slots(before: Slots, after: Slots, ranks_per_node: int) -> Slots:
    """``after`` with as little moved as its packs allow.

    Inside a node the packs go to the ranks that hold most of them already (the largest overlap
    first), and what a rank keeps stays in its slot.
    """
    kept: Slots = [[] for _ in after]
    for first in range(0, len(after), ranks_per_node):
        node = range(first, first + ranks_per_node)
        overlaps = sorted(
            (-_overlap(before[rank], after[index]), rank != index, rank, index)
            for rank in node
            for index in node
        )
        rank_of: dict[int, int] = {}
        for _, _, rank, index in overlaps:
            if index not in rank_of and rank not in rank_of.values():
                rank_of[index] = rank
        for index, rank in rank_of.items():
            kept[rank] = _in_place(before[rank], after[index])
    return kept


def _overlap(one: list[int], other: list[int]) -> int:
    return sum(min(one.count(expert), other.count(expert)) for expert in set(one))


def _in_place(before: list[int], after: list[int]) -> list[int]:
    left = list(after)
    slots: list[int | None] = []
    for expert in before[: len(after)]:
        found = expert in left
        slots.append(expert if found else None)
        if found:
            left.remove(expert)
    slots += [None] * (len(after) - len(slots))
    return [left.pop(0) if expert is None else expert for expert in slots]


def _check(
    load: torch.Tensor,
    num_physical: int,
    num_ranks: int,
    num_groups: int,
    num_nodes: int,
    previous: torch.Tensor | None,
) -> None:
    if load.dim() != 2 or load.shape[1] < 1:
        raise ValueError(f"load must be [L, E], got {tuple(load.shape)}")
    E = load.shape[1]
    good = load.double().isfinite() & (load >= 0)
    if not bool(good.all()):
        layer, expert = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"load must be finite and not negative, that of expert {expert} in layer {layer} is "
            f"{load[layer, expert].item()}"
        )
    if num_physical < E or min(num_ranks, num_groups, num_nodes) < 1:
        raise ValueError(
            f"{num_physical} slots for {E} experts over {num_ranks} ranks of {num_nodes} nodes, "
            f"{num_groups} groups"
        )
    for what, size, parts in (
        ("slots", num_physical, num_ranks),
        ("ranks", num_ranks, num_nodes),
        ("experts", E, num_groups),
    ):
        if size % parts:
            raise ValueError(f"{size} {what} do not divide by {parts}")
    if previous is not None and tuple(previous.shape) != (load.shape[0], num_physical):
        raise ValueError(
            f"previous must be [{load.shape[0]}, {num_physical}], got {tuple(previous.shape)}"
        )
