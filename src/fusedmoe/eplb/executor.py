"""Experts on their way: sent while the model goes on, put in place between two forwards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fusedmoe.config import ParallelGroups
from fusedmoe.distributed.agreement import check_agreement, failures_told
from fusedmoe.eplb.transfer import TransferPlan


def expert_bytes(rows: Sequence[torch.Tensor]) -> int:
    """Bytes of one expert over all of its parameters, each [e, width]."""
    return sum(row.shape[1] * row.dtype.itemsize for row in rows)


class ExpertMover:
    """Moves the experts of one layer at a time between the ranks of ``group``.

    ``start`` sends, ``commit`` puts in place what has arrived; between the two the weights are as
    they were, and forwards may run. An expert travels as one message: weights, scales and biases
    together. The buffer for what arrives has room for a whole layer of this rank and is made once.

    ``group`` should not be the one that the layers use, so that the two do not wait for each other.
    All of its ranks make their movers together.
    """

    def __init__(
        self, group: dist.ProcessGroup, bytes_per_expert: int, slots: int, device: torch.device
    ) -> None:
        self.group = group
        self.rank = group.rank()
        self.arrived = torch.empty(slots, bytes_per_expert, dtype=torch.uint8, device=device)
        self._moving: _Moving | None = None
        # NCCL connects a group at its first call, for which a batch may concern too few ranks.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    @property
    def is_moving(self) -> bool:
        """Whether a layer was sent and is not in place yet."""
        return self._moving is not None

    @property
    def is_sending(self) -> bool:
        """Whether messages of this rank are still on their way, as far as the host can see."""
        return self._moving is not None and not all(w.is_completed() for w in self._moving.works)

    def start(self, source: Sequence[torch.Tensor], plan: TransferPlan) -> None:
        """Send what other ranks need of ``source`` ([e, width] per parameter) and receive.

        Every rank of the group calls it with the same plan. Raises ValueError where more arrives
        than there is room for, or another layer is still on its way.
        """
        if self._moving is not None:
            raise ValueError("a layer is still on its way: commit it first")
        moving = _Moving(plan, self.rank)
        if len(moving.targets) > self.arrived.shape[0]:
            raise ValueError(
                f"{len(moving.targets)} experts arrive, there is room for {self.arrived.shape[0]}"
            )
        for number, batch in enumerate(plan.batches):
            operation = partial(dist.P2POp, group=self.group, tag=number)
            operations = []
            for one in batch:
                if one.source_rank == self.rank:
                    message = _message(source, one.source_slot)
                    moving.keep_alive.append(message)
                    operations.append(operation(dist.isend, message, group_peer=one.target_rank))
                if one.target_rank == self.rank:
                    place = self.arrived[moving.targets.index(one.target_slot)]
                    operations.append(operation(dist.irecv, place, group_peer=one.source_rank))
            if operations:
                moving.works += dist.batch_isend_irecv(operations)
        self._moving = moving

    def commit(
        self, target: Sequence[torch.Tensor], source: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Wait for what is on its way (on a GPU, the stream does) and write it into ``target``.

        ``source``: the parameters before, where they are other tensors; those that keep their slot
        are then copied too.
        """
        moving = self._moving
        if moving is None:
            return
        for work in moving.works:
            work.wait()
        self._moving = None
        if not target:
            return
        before = target if source is None else source
        stays = moving.local + ([] if source is None else [(slot, slot) for slot in moving.kept])
        start = 0
        for old, new in zip(map(_byte_view, before), map(_byte_view, target), strict=True):
            width = new.shape[1]
            if stays:
                kept = old[[slot for slot, _ in stays]]  # read before anything is overwritten
                new[[slot for _, slot in stays]] = kept
            if moving.targets:
                new[moving.targets] = self.arrived[: len(moving.targets), start : start + width]
            for slot, again in moving.copies:
                new[again] = new[slot]
            start += width


class _Moving:
    """This rank's share of a plan that is being executed."""

    def __init__(self, plan: TransferPlan, rank: int) -> None:
        self.targets = [
            one.target_slot for batch in plan.batches for one in batch if one.target_rank == rank
        ]
        self.local = [(old, new) for at, old, new in plan.local if at == rank]
        self.kept = [slot for at, slot in plan.kept if at == rank]
        self.copies = [(slot, again) for at, slot, again in plan.copies if at == rank]
        self.works: list[Any] = []
        self.keep_alive: list[torch.Tensor] = []


def _message(source: Sequence[torch.Tensor], slot: int) -> torch.Tensor:
    return torch.cat([_byte_view(row)[slot] for row in source])


def _byte_view(row: torch.Tensor) -> torch.Tensor:
    """[e, width] as bytes of the same memory: not every dtype can be indexed."""
    return row.detach().view(torch.uint8)


def reshard_experts(
    source: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
    plan: TransferPlan,
    group: dist.ProcessGroup,
) -> None:
    """Fill ``target``, the parameters of one layer under another number of ranks, from ``source``.

    ``group`` has the ranks before and after; one that joins has no source (``[]``), one that
    leaves no target. What a ``FusedMoE`` built for the new groups holds is then what the plan
    says. At most as many experts are held twice as the rank has afterwards. Raises
    RanksDisagreeError where ranks were given different plans, or their experts differ in size.
    """
    rows, ranks = target or source, ParallelGroups(dp=group)
    with failures_told(ranks, "the transfer"):
        if not rows:
            raise ValueError("a rank has neither experts before nor after")
        facts = {"bytes of an expert": str(expert_bytes(rows)), "plan": str(plan)}
    check_agreement(facts, ranks, "the transfer")
    slots = target[0].shape[0] if target else 0
    mover = ExpertMover(group, expert_bytes(rows), slots, rows[0].device)
    mover.start(source, plan)
    mover.commit(target, source if source else None)
