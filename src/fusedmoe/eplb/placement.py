"""The published placement: copy the busiest experts, then fill ranks heaviest first.

After DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB): groups of experts to
nodes, copies inside a node, slots to its ranks. Plain Python on one layer: exact, the same on every
rank, and fast enough beside a forward. ``refine`` goes on from what this gives.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Slots = list[list[int]]
"""For each rank, the logical experts in its slots."""


def replicate(load: Sequence[float], num_physical: int) -> list[int]:
    """How many copies each expert gets: the next one always to the expert with the most load
    per copy (the lower id on a tie)."""
    if num_physical < len(load):
        raise ValueError(f"{num_physical} slots cannot hold {len(load)} experts")
    count = [1] * len(load)
    heap = [(-value, expert) for expert, value in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(num_physical - len(load)):
        _, expert = heapq.heappop(heap)
        count[expert] += 1
        heapq.heappush(heap, (-load[expert] / count[expert], expert))
    return count


def pack(weights: Sequence[float], num_packs: int) -> list[list[int]]:
    """Items into equally many per pack: heaviest first to the lightest pack that has room.

    Ties go to the lower index; as many items as packs are left in their order.
    """
    if len(weights) % num_packs:
        raise ValueError(f"{len(weights)} items do not divide over {num_packs} packs")
    room = len(weights) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0.0, index) for index in range(num_packs)]
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        total, index = heapq.heappop(heap)
        packs[index].append(item)
        if len(packs[index]) < room:
            heapq.heappush(heap, (total + weights[item], index))
    return packs


def place_in_node(load: Sequence[float], experts: Sequence[int], slots: int, ranks: int) -> Slots:
    """``slots`` copies of ``experts`` (ids; ``load`` is by id) over the ranks of one node."""
    count = replicate([load[expert] for expert in experts], slots)
    copies = [expert for expert, n in zip(experts, count, strict=True) for _ in range(n)]
    per_copy = dict(zip(experts, count, strict=True))
    packs = pack([load[expert] / per_copy[expert] for expert in copies], ranks)
    return [[copies[item] for item in one] for one in packs]


def experts_of_nodes(load: Sequence[float], num_groups: int, num_nodes: int) -> list[list[int]]:
    """Whole groups of experts to nodes, evenly; one node has them all in order."""
    if num_nodes == 1:
        return [list(range(len(load)))]
    size = len(load) // num_groups
    totals = [sum(load[g * size : (g + 1) * size]) for g in range(num_groups)]
    return [
        [expert for group in groups for expert in range(group * size, (group + 1) * size)]
        for groups in pack(totals, num_nodes)
    ]
