"""Slots in chunks: how many of each group come before each chunk, and before each slot in its own.

What a stable sort of many slots begins with. Grids (chunks,) and (groups,).
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2

CHUNK = 256
# Sizes that follow the number of tokens: a new value must not compile a new kernel.
COUNTS = ("R", "P", "B", "chunks")


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
    tl.store(counts_ptr + lane.to(tl.int64) * chunks + chunk, counts, lane < groups)
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


_launch_counts = Launcher(chunk_counts_kernel, chained=True)
_launch_prefix = Launcher(prefix_kernel, chained=True)


def chunk_prefixes(
    ids: torch.Tensor,
    count_map: torch.Tensor | None,
    groups: int,
    num_mapped: int,
    sorted_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many slots of each group are before each chunk [groups, chunks], in all [groups]) of
    ids [R]; ``sorted_ids`` is filled with padding."""
    (R,), (P,) = ids.shape, sorted_ids.shape
    chunks = -(-R // CHUNK)
    totals = torch.empty(groups, dtype=torch.int32, device=ids.device)
    counts = torch.empty(groups, chunks, dtype=torch.int32, device=ids.device)
    _launch_counts(
        (chunks, 1),
        (ids, count_map, counts, sorted_ids),
        (R, P, groups, num_mapped),
        (CHUNK, power_of_2(groups)),
        4,
    )
    _launch_prefix((groups, 1), (counts, totals), (chunks,), (min(1024, power_of_2(chunks)),), 4)
    return counts, totals
