"""Stable counting sort of routed slots by expert, groups padded to blocks. No atomics, no sync.

ids int32/int64 [R] -> sorted_ids int32 [P], expert_ids int32 [B], num_post int32 [1], and scatter
int32 [R] or None (contract: ``kernels/align.py``). ``count_map`` maps an id before it is counted,
``label_map`` names a group afterwards; at most one of them is there.

Few slots, one launch, grid (groups,): each program counts all groups for its own offset, then
ranks its own slots by a prefix sum. More, two launches: each program of the first counts its own
group alone, because counting all takes longer than a launch. Many, three launches: counts per chunk
of slots, grid (chunks,); their prefix sums over chunks, grid (groups,); placement, grid (chunks,).
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.align_chunks import (
    CHUNK,
    COUNTS,
    chunk_prefixes,
    fill_range,
    rank_in_chunk,
)
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2

ONE_LAUNCH_SLOTS, TWO_LAUNCH_SLOTS = 2048, 4096


@triton.jit
def _label_of(group, label_map_ptr, num_mapped):
    label = group
    if label_map_ptr is not None:
        label = tl.load(label_map_ptr + group, mask=group < num_mapped, other=-1)
    return label


@triton.jit(do_not_specialize=COUNTS)
def group_counts_kernel(
    ids_ptr,
    count_map_ptr,
    counts_ptr,
    R,
    groups,
    num_mapped,
    BLOCK_R: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """counts[group]"""
    me = tl.program_id(0)
    follow_previous(CHAINED)
    mine = tl.zeros([BLOCK_R], dtype=tl.int32)
    for first in range(0, R, BLOCK_R):
        slot = first + tl.arange(0, BLOCK_R)
        ids = tl.load(ids_ptr + slot, slot < R, -1)
        group = local_expert(ids, count_map_ptr, num_mapped, groups)
        mine += (group == me).to(tl.int32)
    tl.store(counts_ptr + me, tl.sum(mine))


@triton.jit(do_not_specialize=COUNTS)
def align_once_kernel(
    ids_ptr,
    count_map_ptr,
    label_map_ptr,
    counts_ptr,
    sorted_ptr,
    expert_ids_ptr,
    num_post_ptr,
    scatter_ptr,
    R,
    P,
    B,
    groups,
    num_mapped,
    block_size,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """The whole alignment; ``counts_ptr`` None: every program counts for itself.

    ROW slots stand side by side in a thread, because sums over threads cost more.
    """
    ROW: tl.constexpr = max(4, BLOCK_R // 256)
    me = tl.program_id(0)
    follow_previous(CHAINED)
    lane = tl.arange(0, BLOCK_G)
    if counts_ptr is None:
        counts = tl.zeros([BLOCK_G], dtype=tl.int32)
        for first in range(0, R, BLOCK_R):
            slot = first + tl.arange(0, BLOCK_R)
            ids = tl.load(ids_ptr + slot, slot < R, -1)
            group = local_expert(ids, count_map_ptr, num_mapped, groups)
            counts += tl.histogram(tl.maximum(group, 0), BLOCK_G, mask=group >= 0)
    else:
        counts = tl.load(counts_ptr + lane, lane < groups, 0, cache_modifier=".cg")
    padded = tl.cdiv(counts, block_size) * block_size
    start = tl.sum(tl.where(lane < me, padded, 0))
    end = start + tl.sum(tl.where(lane == me, padded, 0))
    used = tl.sum(padded)
    label = _label_of(me, label_map_ptr, num_mapped)

    at = start
    for first in range(0, R, BLOCK_R):
        slot = first + tl.reshape(tl.arange(0, BLOCK_R), [BLOCK_R // ROW, ROW])
        ids = tl.load(ids_ptr + slot, slot < R, -1)
        group = local_expert(ids, count_map_ptr, num_mapped, groups)
        mine = group == me
        in_row = tl.cumsum(mine.to(tl.int32), 1)
        of_row = tl.sum(mine.to(tl.int32), 1)
        rank = (tl.cumsum(of_row, 0) - of_row)[:, None] + in_row
        tl.store(sorted_ptr + at + rank - 1, slot, mine)
        at += tl.sum(of_row)
        if scatter_ptr is not None:
            tl.store(scatter_ptr + slot, tl.where(label >= 0, slot, -1), mine)
            nowhere = (group < 0) & (slot < R) & (me == 0)
            tl.store(scatter_ptr + slot, -1, nowhere)

    fill_range(sorted_ptr, R, at, end, 128)
    fill_range(expert_ids_ptr, label, start // block_size, end // block_size, 32)
    share = tl.cdiv(P - used, groups)
    fill_range(sorted_ptr, R, used + me * share, tl.minimum(used + (me + 1) * share, P), 128)
    if me == 0:
        tl.store(num_post_ptr, used)
        fill_range(expert_ids_ptr, -1, used // block_size, B, 128)


@triton.jit(do_not_specialize=COUNTS)
def place_kernel(
    ids_ptr,
    count_map_ptr,
    label_map_ptr,
    counts_ptr,
    totals_ptr,
    sorted_ptr,
    expert_ids_ptr,
    num_post_ptr,
    scatter_ptr,
    R,
    B,
    groups,
    num_mapped,
    block_size,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK_G)
    padded = tl.load(totals_ptr + lane, lane < groups, 0)
    padded = tl.cdiv(padded, block_size) * block_size
    ends = tl.cumsum(padded, 0)
    used = tl.sum(padded)

    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + slot, slot < R, -1)
    group = local_expert(ids, count_map_ptr, num_mapped, groups)
    counted = group >= 0
    known = tl.maximum(group, 0)
    start = tl.gather(ends - padded, known, 0)
    earlier = tl.load(counts_ptr + known.to(tl.int64) * chunks + chunk, counted, 0)
    first_slot = chunk * CHUNK
    rank = rank_in_chunk(
        ids_ptr, count_map_ptr, slot, group, first_slot, R, groups, num_mapped, CHUNK
    )
    tl.store(sorted_ptr + start + earlier + rank, slot, counted)
    if scatter_ptr is not None:
        here = counted & (_label_of(known, label_map_ptr, num_mapped) >= 0)
        tl.store(scatter_ptr + slot, tl.where(here, slot, -1), slot < R)

    share = tl.cdiv(B, chunks)
    last = tl.minimum((chunk + 1) * share, B)
    for first in range(chunk * share, last, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        owner = tl.sum((ends[None, :] <= block[:, None] * block_size).to(tl.int32), 1)
        live = block * block_size < used
        label = _label_of(tl.where(live, owner, 0), label_map_ptr, num_mapped)
        tl.store(expert_ids_ptr + block, tl.where(live, label, -1), block < last)
    if chunk == 0:
        tl.store(num_post_ptr, used)


_launch_once = Launcher(align_once_kernel, chained=True)
_launch_group_counts = Launcher(group_counts_kernel, chained=True)
_launch_place = Launcher(place_kernel, chained=True)


def align(
    ids: torch.Tensor,
    block_size: int,
    groups: int,
    P: int,
    expert_map: torch.Tensor | None,
    drop_remote: bool,
    with_scatter: bool,
    out: MoEAlignment | None = None,
) -> tuple[MoEAlignment, torch.Tensor | None]:
    """As ``align_reference``, on the device; ``out`` are tensors to write into."""
    R, B = ids.numel(), -(-P // block_size)
    sorted_ids, expert_ids, num_post = out or (
        torch.empty(size, dtype=torch.int32, device=ids.device) for size in (P, B, 1)
    )
    scatter = torch.empty(R, 1, dtype=torch.int32, device=ids.device) if with_scatter else None
    count_map, label_map = (expert_map, None) if drop_remote else (None, expert_map)
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    block_g = power_of_2(groups)
    if R <= TWO_LAUNCH_SLOTS:
        counts, block_r = None, min(1024, max(32, power_of_2(R)))
        if R > ONE_LAUNCH_SLOTS:
            counts, block_r = torch.empty(groups, dtype=torch.int32, device=ids.device), 4096
            _launch_group_counts(
                (groups, 1), (ids, count_map, counts), (R, groups, num_mapped), (block_r,), 8
            )
        _launch_once(
            (groups, 1),
            (ids, count_map, label_map, counts, sorted_ids, expert_ids, num_post, scatter),
            (R, P, B, groups, num_mapped, block_size),
            (block_r, block_g),
            max(1, min(8, block_r // 128)),
        )
        return MoEAlignment(sorted_ids, expert_ids, num_post), scatter

    counts, totals = chunk_prefixes(ids, count_map, groups, num_mapped, sorted_ids)
    _launch_place(
        (counts.shape[1], 1),
        (ids, count_map, label_map, counts, totals, sorted_ids, expert_ids, num_post, scatter),
        (R, B, groups, num_mapped, block_size),
        (CHUNK, block_g, 8),
        8,
    )
    return MoEAlignment(sorted_ids, expert_ids, num_post), scatter
