"""Group routed slots by expert in large blocks, and what is left of each expert in small ones.

An expert's slots fill blocks of LARGE. Of up to SMALL that remain, a small block is made; of more,
another large one. Small blocks stand behind all large ones, for kernels made for few slots. Triton
bodies: ``kernels/triton/align_tails.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import MAX_SLOTS, MoEAlignment, dense, padded_slots
from fusedmoe.kernels.ids import local_ids

LARGE, SMALL = 256, 128


def tails_rows(R: int, num_local: int) -> int:
    """The most entries that R slots of ``num_local`` experts can take: no expert leaves more than
    half of a large block empty."""
    return padded_slots(R, SMALL, num_local, whole_blocks=True)


def align_with_tails(
    topk_ids: torch.Tensor,
    num_local_experts: int,
    expert_map: torch.Tensor | None,
    *,
    spare_slots: int = 0,
) -> MoEAlignment:
    """topk_ids int [T, K] -> ``MoEAlignment`` of the slots of local experts, in blocks of SMALL.

    sorted_ids int32 [P], P = ``tails_rows`` and ``spare_slots``; expert_ids int32 [P / SMALL], so
    that a large block has two entries; num_tokens_post_pad int32 [2]: how much of ``sorted_ids``
    large blocks take, and all of them. Raises ValueError for ids that are not integers and for too
    many slots.
    """
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    P = tails_rows(topk_ids.numel(), num_local_experts) + spare_slots
    if P > MAX_SLOTS:
        raise ValueError(f"{topk_ids.numel()} slots in blocks of {SMALL} pass {MAX_SLOTS}")
    ids = topk_ids.reshape(-1).contiguous()
    if topk_ids.is_cuda:
        from fusedmoe.kernels.triton.align_tails import align
    else:
        align = align_with_tails_reference
    return align(ids, num_local_experts, P, dense(expert_map))


def align_with_tails_reference(
    ids: torch.Tensor, groups: int, P: int, expert_map: torch.Tensor | None
) -> MoEAlignment:
    """The definition, in plain torch, for flat ids [R]."""
    R = ids.numel()
    group = local_ids(ids, groups, expert_map)
    slots = [(group == index).nonzero()[:, 0] for index in range(groups)]
    sorted_ids = torch.full((P,), R, dtype=torch.int32, device=ids.device)
    expert_ids = torch.full((-(-P // SMALL),), -1, dtype=torch.int32, device=ids.device)
    ends, last = [], 0
    for size in (LARGE, SMALL):
        for index, of in enumerate(slots):
            count = len(of) - len(of) % LARGE if len(of) % LARGE <= SMALL else len(of)
            part = of[:count] if size == LARGE else of[count:]
            first, last = last, last + -(-len(part) // size) * size
            sorted_ids[first : first + len(part)] = part
            expert_ids[first // SMALL : last // SMALL] = index
        ends.append(last)
    num_post = torch.tensor(ends, dtype=torch.int32, device=ids.device)
    return MoEAlignment(sorted_ids, expert_ids, num_post)
