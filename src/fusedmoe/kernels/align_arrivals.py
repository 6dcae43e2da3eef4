"""Blocks of slots by expert, in the order in which the ranks' rows arrive.

As ``align_local_slots``; but inside an expert slots stand in the order of their rows' arrival, and
the blocks of all experts in the order in which their last rows arrive. So products may begin while
rows are still on their way. Triton bodies: ``kernels/triton/align_arrivals.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.kernels.align import MoEAlignment, dense, padded_slots
from fusedmoe.kernels.ids import local_ids
from fusedmoe.kernels.peer_layout import LateRows, PeerView, arrival_order


class Arrivals(NamedTuple):
    """What a kernel needs that waits for rows itself.

    ``needs`` int32 [blocks]: how many ranks' rows, beside this rank's own, have to be there, in the
    order of ``arrival_order``. ``max_polls``: looks at a flag before its rank counts as missing.
    """

    needs: torch.Tensor
    here: PeerView
    max_polls: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """``needs``, and the flags, state and error word of ``kernels/triton/peer_dispatch.py``."""
        here = self.here
        at = here.layout.row_flags_at
        flags = here.own[at : at + here.layout.world * 4].view(torch.int32)
        return self.needs, flags, here.state, here.error


def align_arrivals(
    topk_ids: torch.Tensor,
    block_size: int,
    num_local_experts: int,
    expert_map: torch.Tensor | None,
    x: LateRows,
    *,
    spare_slots: int = 0,
) -> tuple[MoEAlignment, Arrivals]:
    """topk_ids int [world * rows, K] of the rows ``x`` -> blocks and when each may begin.

    The table of slots is as long as if every block were in use, ``spare_slots`` of padding follow.
    Where this rank's own rows fill a block of every expert, a block waits for its own rows or for
    all: finer steps would only have weights read more often.
    """
    layout, (S, K) = x.here.layout, topk_ids.shape
    P = padded_slots(S * K, block_size, num_local_experts, whole_blocks=True) + spare_slots
    arguments = (
        *(topk_ids.reshape(-1).contiguous(), S // layout.world * K),
        *(arrival_order(x.here.rank, layout.world), block_size, num_local_experts, P),
        dense(expert_map),
        goes_stepwise(S // layout.world * K, block_size, num_local_experts * layout.world),
    )
    if topk_ids.is_cuda:
        from fusedmoe.kernels.triton.align_arrivals import align_arrivals as implementation

        alignment, needs = implementation(*arguments)
    else:
        alignment, needs = align_arrivals_reference(*arguments)
    return alignment, Arrivals(needs, x.here, x.max_polls)


def goes_stepwise(slots_per_rank: int, block_size: int, num_experts: int) -> bool:
    return slots_per_rank < block_size * num_experts


def align_arrivals_reference(
    ids: torch.Tensor,
    slots_per_rank: int,
    order: list[int],
    block_size: int,
    groups: int,
    P: int,
    expert_map: torch.Tensor | None,
    stepwise: bool,
) -> tuple[MoEAlignment, torch.Tensor]:
    """The definition, in plain torch, for flat ids [world * slots_per_rank]."""
    R = ids.numel()
    arrival = torch.empty(len(order), dtype=torch.int64)
    arrival[torch.tensor(order)] = torch.arange(len(order))
    when = arrival.to(ids.device)[torch.arange(R, device=ids.device) // max(slots_per_rank, 1)]
    group = local_ids(ids, groups, expert_map)
    blocks: list[tuple[int, int, torch.Tensor]] = []
    for expert in range(groups):
        slots = (group == expert).nonzero()[:, 0]
        slots = slots[when[slots].argsort(stable=True)]
        for block in slots.split(block_size) if slots.numel() else ():
            blocks.append((int(when[block].max()), expert, block))
    if not stepwise:
        blocks = [(last and len(order) - 1, *rest) for last, *rest in blocks]
    blocks.sort(key=lambda one: one[:2])  # stable: blocks of an expert keep their order
    count = -(-P // block_size)
    sorted_ids = torch.full((P,), R, dtype=torch.int32, device=ids.device)
    expert_ids = torch.full((count,), -1, dtype=torch.int32, device=ids.device)
    needs = torch.zeros(count, dtype=torch.int32, device=ids.device)
    for index, (last, expert, block) in enumerate(blocks):
        first = index * block_size
        sorted_ids[first : first + block.numel()] = block
        expert_ids[index], needs[index] = expert, last
    used = torch.tensor([len(blocks) * block_size], dtype=torch.int32, device=ids.device)
    return MoEAlignment(sorted_ids, expert_ids, used), needs
