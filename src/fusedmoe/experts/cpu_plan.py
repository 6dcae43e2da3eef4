"""Which rows go to which expert, worked out on the host in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

MAX_ROWS = 2048


class Route(NamedTuple):
    """How an id becomes a local expert: ``limit`` global ids, through ``table`` if there is one."""

    num_local: int
    limit: int
    table: list[int] | None = None

    @classmethod
    def make(
        cls, num_local: int, expert_map: torch.Tensor | None = None, num_global: int = -1
    ) -> Route:
        """``num_global`` -1: the length of the map, else the number of local experts."""
        table = None if expert_map is None else expert_map.tolist()
        if num_global < 0:
            num_global = num_local if table is None else len(table)
        return cls(num_local, num_global, table)

    def local(self, expert: int) -> int:
        """The local expert of a global id, -1 where it is not here; ValueError out of range."""
        if not -1 <= expert < self.limit:
            raise ValueError(
                f"topk_ids contain {expert}, which is neither -1 nor one of {self.limit} experts"
            )
        if expert >= 0 and self.table is not None:
            expert = self.table[expert]
        return expert if expert < self.num_local else -1


class SortedSlots(NamedTuple):
    """The routed slots (t, k), sorted by expert into rows 0, 1, ...; those of id -1 are left out.

    ``counts``: (expert, its rows), ascending; ``tokens``: the token of each row. In slot order:
    ``slots`` t * K + k, ``rows`` the row of each, ``offsets`` [T]: where the slots of a token
    start in these two.
    """

    counts: list[ExpertRows]
    tokens: list[int]
    slots: list[int]
    rows: list[int]
    offsets: list[int]


class ExpertRows(NamedTuple):
    """So many rows, one after the other, of one expert."""

    expert: int
    rows: int


class Block(NamedTuple):
    """Sorted rows [start, stop) and the experts they belong to, in order."""

    start: int
    stop: int
    experts: list[ExpertRows]


def sort_slots(topk_ids: list[list[int]], route: Route) -> SortedSlots:
    """Sort the slots of [T, K] ids; ValueError for an id that is neither -1 nor an expert's."""
    by_expert: dict[int, list[tuple[int, int]]] = {}
    slots: list[int] = []
    offsets: list[int] = []
    for token, picks in enumerate(topk_ids):
        offsets.append(len(slots))
        for k, given in enumerate(picks):
            expert = route.local(given)
            if expert >= 0:
                by_expert.setdefault(expert, []).append((token, len(slots)))
                slots.append(token * len(picks) + k)
    counts: list[ExpertRows] = []
    tokens: list[int] = []
    rows = [0] * len(slots)
    for expert in sorted(by_expert):
        members = by_expert[expert]
        counts.append(ExpertRows(expert, len(members)))
        for token, position in members:
            rows[position] = len(tokens)
            tokens.append(token)
    return SortedSlots(counts, tokens, slots, rows, offsets)


def blocks_of(counts: list[ExpertRows], block_rows: int) -> Iterator[Block]:
    """Cut the sorted rows into blocks of whole experts, up to ``block_rows`` where those allow.

    An expert with more than ``MAX_ROWS`` is cut.
    """
    start = stop = 0
    shared: list[ExpertRows] = []
    for expert, count in counts:
        if shared and (stop - start + count > block_rows or count > MAX_ROWS):
            yield Block(start, stop, shared)
            start, shared = stop, []
        while count > MAX_ROWS:
            yield Block(start, start + MAX_ROWS, [ExpertRows(expert, MAX_ROWS)])
            start = stop = start + MAX_ROWS
            count -= MAX_ROWS
        shared.append(ExpertRows(expert, count))
        stop += count
    if shared:
        yield Block(start, stop, shared)
