"""Small tables over routed ids: rows per expert, local ids, blocks of a batched layout.

Triton bodies: ``kernels/triton/counts.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.align import MAX_SLOTS, MoEAlignment
from fusedmoe.kernels.ids import check_expert_map, local_ids


def count_expert_num_tokens(
    topk_ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None = None
) -> torch.Tensor:
    """How many slots each local expert has: int32 [num_local_experts].

    topk_ids int of any shape; ``expert_map`` int32, global -> local id or -1. Ids without a local
    expert are not counted. Raises ValueError for fewer than one expert, ids not int32 or int64 and
    what is no such map.
    """
    _check_ids(topk_ids, expert_map)
    if num_local_experts < 1:
        raise ValueError(f"num_local_experts must be positive, got {num_local_experts}")
    if topk_ids.is_cuda:
        from fusedmoe.kernels.triton.counts import count

        return count(topk_ids.reshape(-1), num_local_experts, expert_map)
    return count_reference(topk_ids, num_local_experts, expert_map)


def count_reference(
    topk_ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, in plain torch."""
    ids = local_ids(topk_ids, num_local_experts, expert_map).flatten()
    experts = torch.arange(num_local_experts, device=ids.device)
    return (ids[:, None] == experts).sum(0, dtype=torch.int32)


def remap_topk_to_local(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """Each id's local expert, -1 where there is none; shape and dtype of ``topk_ids``.

    One launch on a GPU. Raises ValueError for ids not int32 or int64 and for another kind of map.
    """
    _check_ids(topk_ids, expert_map)
    if topk_ids.is_cuda:
        from fusedmoe.kernels.triton.counts import remap

        return remap(topk_ids, expert_map)
    return remap_reference(topk_ids, expert_map)


def remap_reference(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch."""
    return local_ids(topk_ids, MAX_SLOTS, expert_map).to(topk_ids.dtype)


def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: torch.Tensor
) -> MoEAlignment:
    """Blocks over the rows of [E, max_tokens_per_batch, H], for a GEMM that walks blocks.

    expert_num_tokens int32 [E], at most ``max_tokens_per_batch`` each (more count as that many).
    Slots are rows of the flattened layout, E * max_tokens_per_batch is padding; expert_ids and
    num_tokens_post_pad as in ``MoEAlignment``. P = E * max_tokens_per_batch rounded up per expert.
    """
    if block_size < 1 or max_tokens_per_batch < 0:
        raise ValueError(
            f"block_size {block_size} must be positive, max_tokens_per_batch "
            f"{max_tokens_per_batch} not negative"
        )
    P = expert_num_tokens.shape[0] * -(-max_tokens_per_batch // block_size) * block_size
    if P > MAX_SLOTS:
        raise ValueError(
            f"{expert_num_tokens.shape[0]} experts of {max_tokens_per_batch} rows pass {MAX_SLOTS}"
        )
    if expert_num_tokens.is_cuda:
        from fusedmoe.kernels.triton.counts import batched_align as implementation
    else:
        implementation = batched_align_reference
    return implementation(max_tokens_per_batch, block_size, expert_num_tokens, P)


def batched_align_reference(
    max_tokens: int, block_size: int, expert_num_tokens: torch.Tensor, P: int
) -> MoEAlignment:
    """The definition, in plain torch."""
    E, device = expert_num_tokens.shape[0], expert_num_tokens.device
    sorted_ids = torch.full((P,), E * max_tokens, dtype=torch.int32, device=device)
    expert_ids = torch.full((P // block_size,), -1, dtype=torch.int32, device=device)
    first = 0
    for expert, count in enumerate(expert_num_tokens.clamp(0, max_tokens).tolist()):
        blocks = -(-count // block_size)
        sorted_ids[first : first + count] = torch.arange(count, device=device) + expert * max_tokens
        expert_ids[first // block_size : first // block_size + blocks] = expert
        first += blocks * block_size
    used = torch.tensor([first], dtype=torch.int32, device=device)
    return MoEAlignment(sorted_ids, expert_ids, used)


def _check_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> None:
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    check_expert_map(expert_map, topk_ids)
