"""Blocks of slots by expert: first those of rows that are here, then those of rows to come.

As ``align_local_slots``; but inside an expert this rank's own slots stand first, and of the blocks
of all experts those that hold no others. So products may begin while rows are still on their way.
Triton bodies: ``kernels/triton/align_arrivals.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.kernels.align import MoEAlignment, dense, padded_slots
from fusedmoe.kernels.ids import local_ids
from fusedmoe.kernels.peer_layout import LateRows


class Arrivals(NamedTuple):
    """What a kernel needs that waits for rows itself.

    ``early`` int32 [1]: how many blocks, from the first, need this rank's own rows alone.
    """

    early: torch.Tensor
    rows: LateRows

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """``early``, and the flags, state and error word of ``kernels/triton/peer_flags.py``."""
        here = self.rows.here
        at = here.layout.row_flags_at
        flags = here.own[at : at + here.layout.world * 4].view(torch.int32)
        return self.early, flags, here.state, here.error


def align_arrivals(
    topk_ids: torch.Tensor,
    block_size: int,
    num_local_experts: int,
    expert_map: torch.Tensor | None,
    x: LateRows,
    *,
    spare_slots: int = 0,
) -> tuple[MoEAlignment, Arrivals]:
    """topk_ids int [world * rows, K] of the rows ``x`` -> blocks, and which may begin at once.

    The table of slots is as long as if every block were in use, ``spare_slots`` of padding follow.
    """
    layout, (S, K) = x.here.layout, topk_ids.shape
    P = padded_slots(S * K, block_size, num_local_experts, whole_blocks=True) + spare_slots
    arguments = (
        *(topk_ids.reshape(-1).contiguous(), S // layout.world * K, x.here.rank),
        *(block_size, num_local_experts, P, dense(expert_map)),
    )
    if topk_ids.is_cuda:
        from fusedmoe.kernels.triton.align_arrivals import align_arrivals as implementation

        alignment, early = implementation(*arguments)
    else:
        alignment, early = align_arrivals_reference(*arguments)
    return alignment, Arrivals(early, x)


def align_arrivals_reference(
    ids: torch.Tensor,
    slots_per_rank: int,
    rank: int,
    block_size: int,
    groups: int,
    P: int,
    expert_map: torch.Tensor | None,
) -> tuple[MoEAlignment, torch.Tensor]:
    """The definition, in plain torch, for flat ids [ranks * slots_per_rank]."""
    R = ids.numel()
    first, last = rank * slots_per_rank, (rank + 1) * slots_per_rank
    group = local_ids(ids, groups, expert_map)
    slot = torch.arange(R, device=ids.device)
    others = (slot < first) | (slot >= last)
    blocks: list[tuple[bool, int, torch.Tensor]] = []
    for expert in range(groups):
        slots = (group == expert).nonzero()[:, 0]
        slots = slots[others[slots].int().argsort(stable=True)]
        for block in slots.split(block_size) if slots.numel() else ():
            blocks.append((bool(others[block].any()), expert, block))
    blocks.sort(key=lambda one: one[:2])  # stable: blocks of an expert keep their order
    count = -(-P // block_size)
    sorted_ids = torch.full((P,), R, dtype=torch.int32, device=ids.device)
    expert_ids = torch.full((count,), -1, dtype=torch.int32, device=ids.device)
    for index, (_, expert, block) in enumerate(blocks):
        start = index * block_size
        sorted_ids[start : start + block.numel()] = block
        expert_ids[index] = expert
    used = torch.tensor([len(blocks) * block_size], dtype=torch.int32, device=ids.device)
    early = ids.new_tensor([sum(not late for late, *_ in blocks)], dtype=torch.int32)
    return MoEAlignment(sorted_ids, expert_ids, used), early
