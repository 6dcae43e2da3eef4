"""A placement made better by exchanging experts between ranks, and copies between experts.

Every step lowers the load of the heaviest rank and lifts no other to it, so that the result is
never worse than what it begins with. Loads are fp64 on the CPU: the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedmoe.eplb.placement import Slots

EVEN_ENOUGH = 1.005
MAX_STEPS = 1000


def refine(
    slots: Slots, load: Sequence[float], even: float = EVEN_ENOUGH, steps: int = MAX_STEPS
) -> Slots:
    """Better ``slots`` of the same ranks, until max / mean is ``even`` or no step helps.

    ``load`` by expert id; each expert that has a slot keeps one at least.
    """
    work = _Work(slots, load)
    for _ in range(steps):
        loads = work.rank_loads()
        heaviest = int(loads.argmax())
        top = float(loads[heaviest])
        if top <= even * float(loads.mean()):
            break
        exchange, recount = work.best_exchange(loads, heaviest), work.best_recount(loads, heaviest)
        if min(exchange[0], recount[0]) >= top * (1 - 1e-12):
            break
        if recount[0] < exchange[0]:
            work.recount(*recount[1])
        else:
            work.exchange(*exchange[1])
    return work.slots.tolist()


class _Work:
    def __init__(self, slots: Slots, load: Sequence[float]) -> None:
        self.slots = torch.tensor(slots, device="cpu")
        self.load = torch.tensor(load, dtype=torch.float64, device="cpu")
        self.count = torch.bincount(self.slots.flatten(), minlength=len(load))

    def _per_copy(self) -> torch.Tensor:
        return self.load / self.count.clamp_min(1)

    def rank_loads(self) -> torch.Tensor:
        return self._per_copy()[self.slots].sum(1)

    def best_exchange(
        self, loads: torch.Tensor, rank: int
    ) -> tuple[float, tuple[tuple[int, int], tuple[int, int]]]:
        """The two slots whose exchange leaves the lower maximum on their ranks, and that."""
        ranks, per_rank = self.slots.shape
        value = self._per_copy()[self.slots]
        moved = value[rank][:, None, None] - value[None]  # [slot here, rank there, slot there]
        worst = torch.maximum(loads[rank] - moved, loads[None, :, None] + moved)
        worst[:, rank] = float("inf")
        at = int(worst.argmin())
        here, there = divmod(at, ranks * per_rank)
        return float(worst.flatten()[at]), ((rank, here), divmod(there, per_rank))

    def best_recount(
        self, loads: torch.Tensor, rank: int
    ) -> tuple[float, tuple[tuple[int, int], int]]:
        """The slot of a copied expert that, given to one of this rank's, leaves the lowest max."""
        best: tuple[float, tuple[tuple[int, int], int]] = (float("inf"), ((0, 0), 0))
        per_copy, spare = self._per_copy(), self.count[self.slots] >= 2
        for expert in self.slots[rank].unique().tolist():
            where = (spare & (self.slots != expert)).nonzero()
            if not len(where):
                continue
            lost = self.slots[where[:, 0], where[:, 1]]
            each = self.load[expert] / (self.count[expert] + 1)
            here = (self.slots == expert).sum(1)
            eased = loads - here * (per_copy[expert] - each)
            of_lost = self.load[lost] / (self.count[lost] - 1)
            copies = (self.slots[None] == lost[:, None, None]).sum(2)  # [candidate, rank]
            after = eased[None] + copies * (of_lost - per_copy[lost])[:, None]
            after[torch.arange(len(where), device="cpu"), where[:, 0]] += each - of_lost
            worst = after.amax(1)
            at = int(worst.argmin())
            if float(worst[at]) < best[0]:
                best = float(worst[at]), ((int(where[at, 0]), int(where[at, 1])), expert)
        return best

    def exchange(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        kept = int(self.slots[one])
        self.slots[one] = self.slots[other]
        self.slots[other] = kept

    def recount(self, slot: tuple[int, int], expert: int) -> None:
        self.count[self.slots[slot]] -= 1
        self.count[expert] += 1
        self.slots[slot] = expert
