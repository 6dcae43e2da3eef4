"""Counting sort of slots by (time of arrival, expert) in whole blocks. No atomics, no sync.

ids int32/int64 [WORLD * slots_per_rank] -> sorted_ids int32 [P], expert_ids and needs int32 [B],
num_post int32 [1] (contract: ``kernels/align_arrivals.py``). Chunks of slots go in the order of
arrival: first this rank's own, then those of the rank before it, and so on. Three launches: counts
per chunk, grid (chunks,); their prefix sums over chunks, grid (groups,); placement, grid (chunks,).

A block's class is that of its last slot: how many ranks' rows are needed beside this rank's own;
without STEPWISE, none or all. An expert's blocks of class up to c are those that the slots up to c
fill, and the last one if no later slot follows.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.align import CHUNK, fill_range, prefix_kernel, rank_in_chunk
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2

COUNTS = ("slots_per_rank", "P", "B", "chunks_per_rank")


@triton.jit
def chunk_bounds(
    chunk, slots_per_rank, chunks_per_rank, me, WORLD: tl.constexpr, CHUNK: tl.constexpr
):
    """(first slot, end of its rank's slots) of a chunk in the order of arrival."""
    source = (me + WORLD - chunk // chunks_per_rank) % WORLD
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
    first, end = chunk_bounds(chunk, slots_per_rank, chunks_per_rank, me, WORLD, CHUNK)
    slot = first + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, slot < end, -1)
    group = local_expert(ids, map_ptr, num_mapped, groups)
    counts = tl.histogram(tl.maximum(group, 0), BLOCK_G, mask=group >= 0)
    lane = tl.arange(0, BLOCK_G)
    tl.store(counts_ptr + lane.to(tl.int64) * chunks + chunk, counts, lane < groups)
    share = tl.cdiv(P, chunks)
    last = tl.minimum((chunk + 1) * share, P)
    fill_range(sorted_ptr, WORLD * slots_per_rank, chunk * share, last, CHUNK)


@triton.jit
def blocks_until(
    when, counts_ptr, totals, lane, groups, chunks, chunks_per_rank, block_size, WORLD: tl.constexpr
):
    """[BLOCK_G]: how many of each group's blocks are of class ``when`` or less."""
    whole = tl.cdiv(totals, block_size)
    if when == WORLD - 1:
        found = whole
    else:
        at = lane.to(tl.int64) * chunks + (when + 1) * chunks_per_rank
        slots = tl.load(counts_ptr + at, lane < groups, 0)
        found = tl.where(slots == totals, whole, slots // block_size)
    return found


@triton.jit(do_not_specialize=COUNTS)
def place_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    totals_ptr,
    sorted_ptr,
    expert_ids_ptr,
    needs_ptr,
    num_post_ptr,
    slots_per_rank,
    chunks_per_rank,
    me,
    B,
    groups,
    num_mapped,
    block_size,
    WORLD: tl.constexpr,
    STEPWISE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK_G)
    totals = tl.load(totals_ptr + lane, lane < groups, 0)

    first, end = chunk_bounds(chunk, slots_per_rank, chunks_per_rank, me, WORLD, CHUNK)
    slot = first + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, slot < end, -1)
    group = local_expert(ids, map_ptr, num_mapped, groups)
    counted = group >= 0
    known = tl.maximum(group, 0)
    earlier = tl.load(counts_ptr + known.to(tl.int64) * chunks + chunk, counted, 0)
    rank = earlier + rank_in_chunk(
        ids_ptr, map_ptr, slot, group, first, end, groups, num_mapped, CHUNK
    )
    share = tl.cdiv(B, chunks)
    block = chunk * share + tl.arange(0, BLOCK_B)
    wanted = (block < B) & (block < (chunk + 1) * share)
    place = tl.zeros([CHUNK], tl.int32)
    owner = tl.full([BLOCK_B], -1, tl.int32)
    needs = tl.zeros([BLOCK_B], tl.int32)
    base = 0
    before = tl.zeros([BLOCK_G], tl.int32)
    for when in tl.static_range(WORLD):
        if STEPWISE or when == 0 or when == WORLD - 1:
            until = blocks_until(
                when, counts_ptr, totals, lane, groups, chunks, chunks_per_rank, block_size, WORLD
            )
            ends = base + tl.cumsum(until - before, 0)
            mine = rank // block_size
            from_here = mine - tl.gather(
                until, known, 0
            )  # negative: of this class or of one before
            at = (tl.gather(ends, known, 0) + from_here) * block_size + rank % block_size
            place = tl.where((from_here < 0) & (mine >= tl.gather(before, known, 0)), at, place)
            next_base = base + tl.sum(until - before)
            label = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), 1)
            here = (block >= base) & (block < next_base)
            owner = tl.where(here, label, owner)
            needs = tl.where(here, when, needs)
            base = next_base
            before = until
    tl.store(sorted_ptr + place, slot, counted)
    tl.store(expert_ids_ptr + block, owner, wanted)
    tl.store(needs_ptr + block, needs, wanted)
    if chunk == 0:
        tl.store(num_post_ptr, base * block_size)


_launch_counts = Launcher(chunk_counts_kernel, chained=True)
_launch_prefix = Launcher(prefix_kernel, chained=True)
_launch_place = Launcher(place_kernel, chained=True)


def align_arrivals(
    ids: torch.Tensor,
    slots_per_rank: int,
    order: list[int],
    block_size: int,
    groups: int,
    P: int,
    expert_map: torch.Tensor | None,
    stepwise: bool,
) -> tuple[MoEAlignment, torch.Tensor]:
    """As ``align_arrivals_reference``, on the device; ``order`` is that of ``arrival_order``."""
    B, world, me = -(-P // block_size), len(order), order[0]
    sorted_ids, expert_ids, needs, num_post = (
        torch.empty(size, dtype=torch.int32, device=ids.device) for size in (P, B, B, 1)
    )
    per_rank = max(1, -(-slots_per_rank // CHUNK))
    chunks, block_g = world * per_rank, power_of_2(groups)
    counts = torch.empty(groups, chunks, dtype=torch.int32, device=ids.device)
    totals = torch.empty(groups, dtype=torch.int32, device=ids.device)
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    _launch_counts(
        (chunks, 1),
        (ids, expert_map, counts, sorted_ids),
        (slots_per_rank, per_rank, me, P, groups, num_mapped),
        (world, CHUNK, block_g),
        4,
    )
    _launch_prefix((groups, 1), (counts, totals), (chunks,), (min(1024, power_of_2(chunks)),), 4)
    _launch_place(
        (chunks, 1),
        (ids, expert_map, counts, totals, sorted_ids, expert_ids, needs, num_post),
        (slots_per_rank, per_rank, me, B, groups, num_mapped, block_size),
        (world, stepwise, CHUNK, block_g, power_of_2(-(-B // chunks))),
        8,
    )
    return MoEAlignment(sorted_ids, expert_ids, num_post), needs
