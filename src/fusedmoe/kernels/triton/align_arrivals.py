"""Counting sort of slots by expert in whole blocks, this rank's own first. No atomics, no sync.

ids int32/int64 [WORLD * slots_per_rank] -> sorted_ids int32 [P], expert_ids int32 [B], num_post and
early int32 [1] (contract: ``kernels/align_arrivals.py``). Chunks of slots begin with this rank's
own. Three launches: counts per chunk, grid (chunks,); their prefix sums over chunks, grid
(groups,); placement, grid (chunks,).

An expert's early blocks are those that its own slots fill, and the last one if none of others
follows.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.align_chunks import (
    CHUNK,
    earlier_chunks,
    fill_range,
    prefix_kernel,
    slots_of_chunk,
    totals_of_groups,
)
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2

COUNTS = ("slots_per_rank", "P", "B", "chunks_per_rank")


@triton.jit
def chunk_bounds(chunk, slots_per_rank, chunks_per_rank, me, CHUNK: tl.constexpr):
    """(first slot, end of its rank's slots) of a chunk."""
    number = chunk // chunks_per_rank
    source = tl.where(number == 0, me, tl.where(number <= me, number - 1, number))
    first = source * slots_per_rank + chunk % chunks_per_rank * CHUNK
    return first, (source + 1) * slots_per_rank


@triton.jit(do_not_specialize=COUNTS)
def chunk_counts_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    sorted_ptr,
    slots_per_rank,
    chunks_per_rank,
    me,
    P,
    groups,
    num_mapped,
    WORLD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """counts[group, chunk], and sorted_ids filled with padding."""
    follow_previous(CHAINED)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    first, end = chunk_bounds(chunk, slots_per_rank, chunks_per_rank, me, CHUNK)
    slot = first + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, slot < end, -1)
    group = local_expert(ids, map_ptr, num_mapped, groups)
    counts = tl.histogram(tl.maximum(group, 0), BLOCK_G, mask=group >= 0)
    lane = tl.arange(0, BLOCK_G)
    tl.store(counts_ptr + lane.to(tl.int64) * chunks + chunk, counts, lane < groups)
    share = tl.cdiv(P, chunks)
    last = tl.minimum((chunk + 1) * share, P)
    fill_range(sorted_ptr, WORLD * slots_per_rank, chunk * share, last, CHUNK)


@triton.jit(do_not_specialize=COUNTS)
def place_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    totals_ptr,
    sorted_ptr,
    expert_ids_ptr,
    early_ptr,
    num_post_ptr,
    slots_per_rank,
    chunks_per_rank,
    me,
    B,
    groups,
    num_mapped,
    block_size,
    WORLD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    totals = totals_of_groups(totals_ptr, groups, BLOCK_G)

    first, end = chunk_bounds(chunk, slots_per_rank, chunks_per_rank, me, CHUNK)
    slot, known, counted, rank = slots_of_chunk(
        ids_ptr, map_ptr, first, end, groups, num_mapped, CHUNK
    )
    rank += earlier_chunks(counts_ptr, known, counted, chunk, chunks)
    own = totals
    if WORLD > 1:
        lane = tl.arange(0, BLOCK_G)
        own = earlier_chunks(counts_ptr, lane, lane < groups, chunks_per_rank, chunks)
    whole = tl.cdiv(totals, block_size)
    early = tl.where(own == totals, whole, own // block_size)
    late = whole - early
    num_early = tl.sum(early)
    early_ends = tl.cumsum(early, 0)
    late_ends = num_early + tl.cumsum(late, 0)
    used = num_early + tl.sum(late)

    mine = rank // block_size
    after_early = mine - tl.gather(early, known, 0)
    after_late = mine - tl.gather(whole, known, 0)
    place = tl.where(
        after_early < 0,
        tl.gather(early_ends, known, 0) + after_early,
        tl.gather(late_ends, known, 0) + after_late,
    )
    tl.store(sorted_ptr + place * block_size + rank % block_size, slot, counted)

    share = tl.cdiv(B, chunks)
    block = chunk * share + tl.arange(0, BLOCK_B)
    ends = tl.where((block < num_early)[:, None], early_ends[None, :], late_ends[None, :])
    owner = tl.sum((ends <= block[:, None]).to(tl.int32), 1)
    wanted = (block < B) & (block < (chunk + 1) * share)
    tl.store(expert_ids_ptr + block, tl.where(block < used, owner, -1), wanted)
    if chunk == 0:
        tl.store(num_post_ptr, used * block_size)
        tl.store(early_ptr, num_early)


_launch_counts = Launcher(chunk_counts_kernel, chained=True)
_launch_prefix = Launcher(prefix_kernel, chained=True)
_launch_place = Launcher(place_kernel, chained=True)


def align_arrivals(
    ids: torch.Tensor,
    slots_per_rank: int,
    rank: int,
    block_size: int,
    groups: int,
    P: int,
    expert_map: torch.Tensor | None,
) -> tuple[MoEAlignment, torch.Tensor]:
    """As ``align_arrivals_reference``, on the device."""
    B, world = -(-P // block_size), ids.numel() // slots_per_rank
    sorted_ids, expert_ids, num_post, early = (
        torch.empty(size, dtype=torch.int32, device=ids.device) for size in (P, B, 1, 1)
    )
    per_rank = -(-slots_per_rank // CHUNK)
    chunks, block_g = world * per_rank, power_of_2(groups)
    counts = torch.empty(groups, chunks, dtype=torch.int32, device=ids.device)
    totals = torch.empty(groups, dtype=torch.int32, device=ids.device)
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    _launch_counts(
        (chunks, 1),
        (ids, expert_map, counts, sorted_ids),
        (slots_per_rank, per_rank, rank, P, groups, num_mapped),
        (world, CHUNK, block_g),
        4,
    )
    _launch_prefix((groups, 1), (counts, totals), (chunks,), (min(1024, power_of_2(chunks)),), 4)
    _launch_place(
        (chunks, 1),
        (ids, expert_map, counts, totals, sorted_ids, expert_ids, early, num_post),
        (slots_per_rank, per_rank, rank, B, groups, num_mapped, block_size),
        (world, CHUNK, block_g, power_of_2(-(-B // chunks))),
        8,
    )
    return MoEAlignment(sorted_ids, expert_ids, num_post), early
