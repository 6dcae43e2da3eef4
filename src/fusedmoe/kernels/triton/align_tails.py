"""Stable counting sort of routed slots by expert, large blocks first, then small ones. No atomics.

ids int32/int64 [R] -> sorted_ids int32 [P], expert_ids int32 [B], num_post int32 [2] (contract:
``kernels/align_tails.py``). Three launches, the first two those of ``align``: counts per chunk of
slots, grid (chunks,); their prefix sums over chunks, grid (groups,); placement, grid (chunks,).
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.align_tails import LARGE, SMALL
from fusedmoe.kernels.triton.align_chunks import (
    CHUNK,
    COUNTS,
    chunk_prefixes,
    earlier_chunks,
    slots_of_chunk,
    totals_of_groups,
)
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2


@triton.jit
def owner_of(place, ends):
    """The group whose run of places, up to ``ends`` [groups], has each of these."""
    return tl.sum((ends[None, :] <= place[:, None]).to(tl.int32), 1)


@triton.jit(do_not_specialize=COUNTS)
def place_tails_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    totals_ptr,
    sorted_ptr,
    expert_ids_ptr,
    num_post_ptr,
    R,
    B,
    groups,
    num_mapped,
    LARGE: tl.constexpr,
    SMALL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    totals = totals_of_groups(totals_ptr, groups, BLOCK_G)
    rest = totals % LARGE
    large = totals // LARGE * LARGE + tl.where(rest > SMALL, LARGE, 0)
    small = tl.where((rest > 0) & (rest <= SMALL), SMALL, 0)
    used_by_large = tl.sum(large)
    used = used_by_large + tl.sum(small)
    ends = tl.cumsum(large, 0)
    small_ends = used_by_large + tl.cumsum(small, 0)

    slot, known, counted, rank = slots_of_chunk(
        ids_ptr, map_ptr, chunk * CHUNK, R, groups, num_mapped, CHUNK
    )
    rank += earlier_chunks(counts_ptr, known, counted, chunk, chunks)
    in_large = tl.gather(large, known, 0)
    place = tl.gather(ends - large, known, 0) + rank
    behind = tl.gather(small_ends - small, known, 0) + rank - in_large
    tl.store(sorted_ptr + tl.where(rank < in_large, place, behind), slot, counted)

    share = tl.cdiv(B, chunks)
    last = tl.minimum((chunk + 1) * share, B)
    for first in range(chunk * share, last, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        begins = block * SMALL
        owner = tl.where(
            begins < used_by_large, owner_of(begins, ends), owner_of(begins, small_ends)
        )
        tl.store(expert_ids_ptr + block, tl.where(begins < used, owner, -1), block < last)
    if chunk == 0:
        tl.store(num_post_ptr, used_by_large)
        tl.store(num_post_ptr + 1, used)


_launch_place = Launcher(place_tails_kernel, chained=True)


def align(ids: torch.Tensor, groups: int, P: int, expert_map: torch.Tensor | None) -> MoEAlignment:
    """As ``align_with_tails_reference``, on the device."""
    R, B = ids.numel(), -(-P // SMALL)
    tables = MoEAlignment.empty(P, SMALL, ids.device, counts=2)
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    counts, totals = chunk_prefixes(ids, expert_map, groups, num_mapped, tables.sorted_ids)
    _launch_place(
        (counts.shape[1], 1),
        (ids, expert_map, counts, totals, *tables),
        (R, B, groups, num_mapped),
        (LARGE, SMALL, CHUNK, power_of_2(groups), 8),
        8,
    )
    return tables
