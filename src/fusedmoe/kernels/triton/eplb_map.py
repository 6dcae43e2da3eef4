"""Logical expert ids to the replica that serves them, and its load, in one launch.

Grid cdiv(T * K, BLOCK): one program maps BLOCK slots.

ids int [T, K] of any strides; table int [L, R], replica count int [L], load int32 [P], all
contiguous; should_record (one element) and num_valid (one integer) may be None.
-> physical ids [T, K], contiguous; load[p] += 1 by integer atomics, whose sum has no order.

Invariant: no id, replica count or table entry is used as an address before its range is checked.
"""

import torch
import triton
import triton.language as tl

HASH_MULTIPLIER = tl.constexpr(2654435769)


@triton.jit(do_not_specialize=["num_slots"])
def eplb_map_kernel(
    ids_ptr,
    table_ptr,
    count_ptr,
    load_ptr,
    should_record_ptr,
    num_valid_ptr,
    out_ptr,
    num_slots,
    stride_token,
    stride_pick,
    num_logical,
    num_physical,
    K: tl.constexpr,
    REPLICAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    token = slot // K
    logical = tl.load(
        ids_ptr + token * stride_token + slot % K * stride_pick, mask=inside, other=-1
    ).to(tl.int64)
    known = (logical >= 0) & (logical < num_logical)
    count = tl.load(count_ptr + logical, mask=known, other=0).to(tl.int64)
    count = tl.minimum(count, REPLICAS)
    known = known & (count > 0)
    replica = ((token * HASH_MULTIPLIER) & 0xFFFFFFFF) % tl.maximum(count, 1)
    physical = tl.load(table_ptr + logical * REPLICAS + replica, mask=known, other=-1).to(tl.int64)
    known = known & (physical >= 0) & (physical < num_physical)
    tl.store(out_ptr + slot, tl.where(known, physical, -1), mask=inside)
    if num_valid_ptr is not None:
        known = known & (token < tl.load(num_valid_ptr))
    if should_record_ptr is not None:
        known = known & (tl.load(should_record_ptr) != 0)
    tl.atomic_add(load_ptr + physical, 1, mask=known, sem="relaxed")


def eplb_map_triton(
    topk_ids: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    expert_load_view: torch.Tensor,
    should_record: torch.Tensor | None = None,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``eplb_map_reference``; arguments are checked by the caller."""
    num_tokens, picks = topk_ids.shape
    physical = torch.empty((num_tokens, picks), dtype=topk_ids.dtype, device=topk_ids.device)
    num_slots = num_tokens * picks
    if num_slots == 0:
        return physical
    block = min(256, triton.next_power_of_2(num_slots))
    eplb_map_kernel[(triton.cdiv(num_slots, block),)](
        topk_ids,
        logical_to_physical_map.contiguous(),
        logical_replica_count.contiguous(),
        expert_load_view,
        should_record,
        num_unpadded_tokens,
        physical,
        num_slots,
        *topk_ids.stride(),
        logical_to_physical_map.shape[0],
        expert_load_view.shape[0],
        K=picks,
        REPLICAS=logical_to_physical_map.shape[1],
        BLOCK=block,
        num_warps=max(1, block // 64),
    )
    return physical
