"""From one placement of a layer's experts to another: who sends what to whom, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusedmoe.eplb.placement import Slots


@dataclass(frozen=True, order=True)
class Transfer:
    """One expert from a slot of one rank to a slot of another."""

    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int


@dataclass(frozen=True)
class TransferPlan:
    """What has to happen so that every slot holds its new expert.

    ``batches``: in each, a rank sends at most one expert and receives at most one. ``local``:
    (rank, slot before, slot after) of experts that stay on their rank, ``kept`` those among them
    that keep their slot. ``copies``: (rank, slot, slot) of a second copy of what has arrived.
    """

    batches: tuple[tuple[Transfer, ...], ...]
    local: tuple[tuple[int, int, int], ...]
    kept: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int, int], ...]

    @property
    def is_empty(self) -> bool:
        return not (self.batches or self.local or self.copies)


def make_transfer_plan(before: Slots, after: Slots) -> TransferPlan:
    """Who sends which expert to whom, so that slots filled as ``before`` are filled as ``after``.

    Both list the logical experts in each rank's slots. A rank that joins has no slots before, one
    that leaves none after. An expert that a rank needs and does not have comes once, from one of
    the ranks that have it: each of S senders serves floor(R / S) consecutive ones of the R
    receivers, those left over go to senders 0, 1, ... Raises ValueError for an expert that nobody
    has.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} ranks before, {len(after)} after")
    local, kept, copies = [], [], []
    needed: dict[int, list[tuple[int, int]]] = {}
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        arriving: dict[int, int] = {}
        for slot, expert in enumerate(new):
            if slot < len(old) and old[slot] == expert:
                kept.append((rank, slot))
            elif expert in old:
                local.append((rank, old.index(expert), slot))
            elif expert in arriving:
                copies.append((rank, arriving[expert], slot))
            else:
                arriving[expert] = slot
                needed.setdefault(expert, []).append((rank, slot))
    transfers = []
    for expert, receivers in sorted(needed.items()):
        senders = [(rank, old.index(expert)) for rank, old in enumerate(before) if expert in old]
        if not senders:
            raise ValueError(f"no rank has expert {expert}")
        for receiver, sender in zip(receivers, _serving(senders, len(receivers)), strict=True):
            transfers.append(Transfer(*sender, *receiver))
    return TransferPlan(_batches(transfers), tuple(local), tuple(kept), tuple(copies))


def _serving(senders: Sequence[tuple[int, int]], receivers: int) -> list[tuple[int, int]]:
    """The sender of each receiver."""
    each = receivers // len(senders)
    order = [sender for sender in senders for _ in range(each)]
    return order + list(senders[: receivers - len(order)])


def _batches(transfers: Sequence[Transfer]) -> tuple[tuple[Transfer, ...], ...]:
    """Each transfer in the first round where its two ranks are free."""
    rounds: list[list[Transfer]] = []
    for one in sorted(transfers):
        free = (r for r in rounds if all(_can_go_together(one, other) for other in r))
        chosen = next(free, None)
        if chosen is None:
            chosen = []
            rounds.append(chosen)
        chosen.append(one)
    return tuple(map(tuple, rounds))


def _can_go_together(one: Transfer, other: Transfer) -> bool:
    return one.source_rank != other.source_rank and one.target_rank != other.target_rank
