"""Stable counting sort of routed slots by expert, groups padded to blocks. No atomics, no sync.

ids int32/int64 [R] -> sorted_ids int32 [P], expert_ids int32 [B], num_post int32 [1], and scatter
int32 [R] or None (contract: ``kernels/align.py``). ``count_map`` maps an id before it is counted,
``label_map`` names a group afterwards; at most one of them is there.

Few slots, one launch, grid (groups,): each program counts all groups for its own offset, then
ranks its own slots by a prefix sum. Many, three launches: counts per chunk of slots, grid
(chunks,); their prefix sums over chunks, grid (groups,); placement, grid (chunks,). Between them
two: smaller chunks, whose counts each program of the placement adds up itself.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.align_chunks import (
    CHUNK,
    COUNTS,
    SMALL_CHUNK,
    add_counts,
    chunk_counts,
    chunk_prefixes,
    earlier_chunks,
    few_chunks,
    fill_range,
    slots_of_chunk,
    totals_of_groups,
)
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2

ONE_LAUNCH_SLOTS = 2048


@triton.jit
def _label_of(group, label_map_ptr, num_mapped):
    label = group
    if label_map_ptr is not None:
        label = tl.load(label_map_ptr + group, mask=group < num_mapped, other=-1)
    return label


@triton.jit(do_not_specialize=COUNTS)
def align_once_kernel(
    ids_ptr,
    count_map_ptr,
    label_map_ptr,
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
    """The whole alignment. ROW slots stand side by side in a thread, because sums over
    threads cost more."""
    ROW: tl.constexpr = max(4, BLOCK_R // 256)
    me = tl.program_id(0)
    follow_previous(CHAINED)
    lane = tl.arange(0, BLOCK_G)
    counts = tl.zeros([BLOCK_G], dtype=tl.int32)
    for first in range(0, R, BLOCK_R):
        slot = first + tl.arange(0, BLOCK_R)
        ids = tl.load(ids_ptr + slot, slot < R, -1)
        group = local_expert(ids, count_map_ptr, num_mapped, groups)
        counts += tl.histogram(tl.maximum(group, 0), BLOCK_G, mask=group >= 0)
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
    CHUNKS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """``totals_ptr`` None: the counts [chunk, group], of at most CHUNKS chunks, are no sums yet."""
    follow_previous(CHAINED)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    if totals_ptr is None:
        totals, before = add_counts(counts_ptr, chunk, chunks, groups, CHUNKS, BLOCK_G)
    else:
        totals = totals_of_groups(totals_ptr, groups, BLOCK_G)
    padded = tl.cdiv(totals, block_size) * block_size
    ends = tl.cumsum(padded, 0)
    used = tl.sum(padded)

    slot, known, counted, rank = slots_of_chunk(
        ids_ptr, count_map_ptr, chunk * CHUNK, R, groups, num_mapped, CHUNK
    )
    start = tl.gather(ends - padded, known, 0)
    if totals_ptr is None:
        earlier = tl.gather(before, known, 0)
    else:
        earlier = earlier_chunks(counts_ptr, known, counted, chunk, chunks)
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
    out = out or MoEAlignment.empty(P, block_size, ids.device)
    scatter = torch.empty(R, 1, dtype=torch.int32, device=ids.device) if with_scatter else None
    count_map, label_map = (expert_map, None) if drop_remote else (None, expert_map)
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    block_g = power_of_2(groups)
    if R <= ONE_LAUNCH_SLOTS:
        block_r = min(1024, max(32, power_of_2(R)))
        _launch_once(
            (groups, 1),
            (ids, count_map, label_map, *out, scatter),
            (R, P, B, groups, num_mapped, block_size),
            (block_r, block_g),
            max(1, min(8, block_r // 128)),
        )
        return out, scatter

    totals, chunk, most = None, SMALL_CHUNK, few_chunks(R, groups)
    if most:
        counts = chunk_counts(ids, count_map, groups, num_mapped, out.sorted_ids, chunk)
    else:
        chunk, most = CHUNK, 1
        counts, totals = chunk_prefixes(ids, count_map, groups, num_mapped, out.sorted_ids)
    _launch_place(
        (-(-R // chunk), 1),
        (ids, count_map, label_map, counts, totals, *out, scatter),
        (R, B, groups, num_mapped, block_size),
        (chunk, block_g, 8, most),
        chunk // 32,
    )
    return out, scatter
