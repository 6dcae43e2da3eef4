"""Stable counting sort by local expert, over as many slots as the device says are valid.

routing_map int32/int64 [R = T * K], num_valid [1] -> sorted_ids int32 [P], expert_ids int32 [B],
num_post int32 [1] (contract: ``kernels/bounded_align.py``). No atomics, no sync.

Few slots expected: one launch, grid (experts,), each program counts all valid slots for its own
offset and ranks its own. It stays right, only slow, where there are many. Many expected: one
launch turns ids into local ones, grid (cdiv(R, BLOCK),), then ``kernels/triton/align.py`` sorts.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.bounded_align import BoundedRouting
from fusedmoe.kernels.triton.align import align
from fusedmoe.kernels.triton.align_chunks import fill_range
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2


@triton.jit
def valid_slots(num_valid_ptr, K, R):
    """How many of the R slots, K per token, belong to valid tokens."""
    return tl.minimum(tl.maximum(tl.load(num_valid_ptr), 0), R // K).to(tl.int32) * K


@triton.jit
def expert_here(ids, first_expert, num_local):
    """The local expert of each id as int32, -1 where there is none."""
    here = (ids >= first_expert) & (ids - first_expert < num_local)
    return tl.where(here, ids - first_expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["R", "P", "B"])
def align_at_once_kernel(
    ids_ptr,
    num_valid_ptr,
    sorted_ptr,
    expert_ids_ptr,
    num_post_ptr,
    K,
    R,
    P,
    B,
    first_expert,
    num_local,
    block_size,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    me = tl.program_id(0)
    live = valid_slots(num_valid_ptr, K, R)
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, live, BLOCK_R):
        slot = start + tl.arange(0, BLOCK_R)
        expert = expert_here(tl.load(ids_ptr + slot, slot < live, -1), first_expert, num_local)
        counts += tl.histogram(tl.maximum(expert, 0), BLOCK_E, mask=expert >= 0)
    lane = tl.arange(0, BLOCK_E)
    padded = tl.cdiv(counts, block_size) * block_size
    begin = tl.sum(tl.where(lane < me, padded, 0))
    end = begin + tl.sum(tl.where(lane == me, padded, 0))
    used = tl.sum(padded)

    at = begin
    for start in range(0, live, BLOCK_R):
        slot = start + tl.arange(0, BLOCK_R)
        expert = expert_here(tl.load(ids_ptr + slot, slot < live, -1), first_expert, num_local)
        mine = expert == me
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(sorted_ptr + at + rank - 1, slot, mine)
        at += tl.sum(mine.to(tl.int32))

    fill_range(sorted_ptr, R, at, end, 128)
    fill_range(expert_ids_ptr, me, begin // block_size, end // block_size, 32)
    share = tl.cdiv(P - used, num_local)
    fill_range(sorted_ptr, R, used + me * share, tl.minimum(used + (me + 1) * share, P), 128)
    if me == 0:
        tl.store(num_post_ptr, used)
        fill_range(expert_ids_ptr, -1, used // block_size, B, 128)


@triton.jit(do_not_specialize=["R"])
def localize_kernel(
    ids_ptr,
    num_valid_ptr,
    local_ptr,
    K,
    R,
    first_expert,
    num_local,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = slot < valid_slots(num_valid_ptr, K, R)
    expert = expert_here(tl.load(ids_ptr + slot, live, -1), first_expert, num_local)
    tl.store(local_ptr + slot, expert, slot < R)


_launch_at_once = Launcher(align_at_once_kernel, chained=True)
_launch_localize = Launcher(localize_kernel, chained=True)
_LOCALIZE_BLOCK = 1024


def align_at_once(routing: BoundedRouting, block_size: int, P: int) -> MoEAlignment:
    ids = routing.routing_map
    alignment = MoEAlignment.empty(P, block_size, ids.device)
    block_r = min(1024, max(32, power_of_2(max(1, routing.R))))
    _launch_at_once(
        (routing.num_local, 1),
        (ids, routing.num_valid, *alignment),
        (
            max(1, ids.shape[1]),
            routing.R,
            P,
            P // block_size,
            routing.first_expert,
            routing.num_local,
            block_size,
        ),
        (block_r, power_of_2(routing.num_local)),
        max(1, min(8, block_r // 128)),
    )
    return alignment


def align_in_steps(routing: BoundedRouting, block_size: int, P: int) -> MoEAlignment:
    ids = routing.routing_map
    local = torch.empty(routing.R, dtype=torch.int32, device=ids.device)
    if routing.R:
        _launch_localize(
            (-(-routing.R // _LOCALIZE_BLOCK), 1),
            (ids, routing.num_valid, local),
            (ids.shape[1], routing.R, routing.first_expert, routing.num_local),
            (_LOCALIZE_BLOCK,),
            4,
        )
    return align(local, block_size, routing.num_local, P, None, False, False)[0]
