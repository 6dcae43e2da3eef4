"""Slots in chunks: how many of each group come before each chunk, and before each slot in its own.

What a stable sort of many slots begins with. Grids (chunks,) and (groups,).
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2

CHUNK, SMALL_CHUNK = 256, 128
MOST_COUNTS = 16384  # of all chunks, for every chunk to add them up
# Sizes that follow the number of tokens: a new value must not compile a new kernel.
COUNTS = ("R", "P", "B", "chunks", "stride_group", "stride_chunk")


@triton.jit
def fill_range(ptr, value, first, last, BLOCK: tl.constexpr):
    """ptr[first:last] = value"""
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(ptr + at, value, at < last)


@triton.jit(do_not_specialize=COUNTS)
def chunk_counts_kernel(
    ids_ptr,
    count_map_ptr,
    counts_ptr,
    sorted_ptr,
    R,
    P,
    groups,
    num_mapped,
    stride_group,
    stride_chunk,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """counts[group, chunk], and sorted_ids filled with padding."""
    follow_previous(CHAINED)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, slot < R, -1)
    group = local_expert(ids, count_map_ptr, num_mapped, groups)
    counts = tl.histogram(tl.maximum(group, 0), BLOCK_G, mask=group >= 0)
    lane = tl.arange(0, BLOCK_G)
    at = lane.to(tl.int64) * stride_group + chunk * stride_chunk
    tl.store(counts_ptr + at, counts, lane < groups)
    share = tl.cdiv(P, chunks)
    fill_range(sorted_ptr, R, chunk * share, tl.minimum((chunk + 1) * share, P), CHUNK)


@triton.jit(do_not_specialize=COUNTS)
def prefix_kernel(counts_ptr, totals_ptr, chunks, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """counts[group, :] becomes its exclusive prefix sum, totals[group] its sum."""
    follow_previous(CHAINED)
    group = tl.program_id(0)
    counts_ptr += group.to(tl.int64) * chunks
    total = 0
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + chunk, chunk < chunks, 0)
        tl.store(counts_ptr + chunk, total + tl.cumsum(counts, 0) - counts, chunk < chunks)
        total += tl.sum(counts)
    tl.store(totals_ptr + group, total)


@triton.jit
def add_counts(counts_ptr, chunk, chunks, groups, CHUNKS: tl.constexpr, BLOCK_G: tl.constexpr):
    """The sums of counts [chunks, groups] over all chunks, and over those before ``chunk``."""
    lane, other = tl.arange(0, BLOCK_G)[None, :], tl.arange(0, CHUNKS)[:, None]
    there = (other < chunks) & (lane < groups)
    counts = tl.load(counts_ptr + other * groups + lane, there, 0, cache_modifier=".cg")
    return tl.sum(counts, 0), tl.sum(tl.where(other < chunk, counts, 0), 0)


@triton.jit
def rank_in_chunk(
    ids_ptr, map_ptr, slot, group, first_slot, limit, groups, num_mapped, CHUNK: tl.constexpr
):
    """How many slots before each one of this chunk, which ends at ``limit``, are of its group."""
    same = tl.zeros([CHUNK, 32], dtype=tl.int32)
    for first in range(0, CHUNK, 32):
        other = first_slot + first + tl.arange(0, 32)
        other_ids = tl.load(ids_ptr + other, other < limit, -1)
        other_group = local_expert(other_ids, map_ptr, num_mapped, groups)
        before = (group[:, None] == other_group[None, :]) & (other[None, :] < slot[:, None])
        same += before.to(tl.int32)
    return tl.sum(same, 1)


@triton.jit
def slots_of_chunk(
    ids_ptr, map_ptr, first, end, groups, num_mapped, CHUNK: tl.constexpr
):  # fmt: skip
    """The slots from ``first`` on, the group of each (0 where it has none), whether it has one, and
    its rank among those of its group in the chunk; none from ``end`` on has one."""
    slot = first + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, slot < end, -1)
    group = local_expert(ids, map_ptr, num_mapped, groups)
    rank = rank_in_chunk(ids_ptr, map_ptr, slot, group, first, end, groups, num_mapped, CHUNK)
    return slot, tl.maximum(group, 0), group >= 0, rank


@triton.jit
def totals_of_groups(totals_ptr, groups, BLOCK_G: tl.constexpr):
    """What ``prefix_kernel`` has stored; past the L1, which a chained launch finds as it was."""
    lane = tl.arange(0, BLOCK_G)
    return tl.load(totals_ptr + lane, lane < groups, 0, cache_modifier=".cg")


@triton.jit
def earlier_chunks(counts_ptr, group, counted, chunk, chunks):
    """How many slots of each ``group`` earlier chunks have, as ``totals_of_groups`` reads."""
    at = counts_ptr + group.to(tl.int64) * chunks + chunk
    return tl.load(at, counted, 0, cache_modifier=".cg")


_launch_counts = Launcher(chunk_counts_kernel, chained=True)
_launch_prefix = Launcher(prefix_kernel, chained=True)


def few_chunks(R: int, groups: int) -> int:
    """A power of two, at least as many as the small chunks of R slots; 0 if those are too many for
    each to add up the counts of all."""
    chunks = power_of_2(-(-R // SMALL_CHUNK))
    return chunks if chunks * power_of_2(groups) <= MOST_COUNTS else 0


def chunk_counts(
    ids: torch.Tensor,
    count_map: torch.Tensor | None,
    groups: int,
    num_mapped: int,
    sorted_ids: torch.Tensor,
    chunk: int,
    group_first: bool = False,
) -> torch.Tensor:
    """How many slots of each group are in each chunk of ``chunk``: [chunks, groups] or, if
    ``group_first``, [groups, chunks]; ``sorted_ids`` is filled with padding."""
    (R,), (P,) = ids.shape, sorted_ids.shape
    chunks = -(-R // chunk)
    shape, strides = (
        ((groups, chunks), (chunks, 1)) if group_first else ((chunks, groups), (1, groups))
    )
    counts = torch.empty(shape, dtype=torch.int32, device=ids.device)
    _launch_counts(
        (chunks, 1),
        (ids, count_map, counts, sorted_ids),
        (R, P, groups, num_mapped, *strides),
        (chunk, power_of_2(groups)),
        4,
    )
    return counts


def chunk_prefixes(
    ids: torch.Tensor,
    count_map: torch.Tensor | None,
    groups: int,
    num_mapped: int,
    sorted_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many slots of each group are before each chunk [groups, chunks], in all [groups]) of
    ids [R]; ``sorted_ids`` is filled with padding."""
    counts = chunk_counts(ids, count_map, groups, num_mapped, sorted_ids, CHUNK, True)
    chunks = counts.shape[1]
    totals = torch.empty(groups, dtype=torch.int32, device=ids.device)
    _launch_prefix((groups, 1), (counts, totals), (chunks,), (min(1024, power_of_2(chunks)),), 4)
    return counts, totals
