"""Counting, renaming and laying out: one launch each.

count: grid (e,), a program counts its expert among ids [R]. remap: grid (cdiv(R, BLOCK),).
batched_align: grid (E,), a program adds up the counts before its own and writes its blocks.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.align_chunks import fill_range
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, power_of_2
from fusedmoe.kernels.triton.mul_sum import ANY_EXPERT


@triton.jit(do_not_specialize=("R", "P", "max_tokens"))
def count_kernel(ids_ptr, map_ptr, counts_ptr, R, num_mapped, num_local, BLOCK: tl.constexpr):
    me = tl.program_id(0)
    mine = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, R, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + slot, slot < R, -1)
        mine += (local_expert(ids, map_ptr, num_mapped, num_local) == me).to(tl.int32)
    tl.store(counts_ptr + me, tl.sum(mine))


@triton.jit(do_not_specialize=("R", "P", "max_tokens"))
def remap_kernel(ids_ptr, map_ptr, out_ptr, R, num_mapped, num_local, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + slot, slot < R, -1)
    tl.store(out_ptr + slot, local_expert(ids, map_ptr, num_mapped, num_local), slot < R)


@triton.jit(do_not_specialize=("R", "P", "max_tokens"))
def batched_align_kernel(
    counts_ptr,
    sorted_ptr,
    expert_ids_ptr,
    num_post_ptr,
    max_tokens,
    P,
    block_size,
    E,
    BLOCK_E: tl.constexpr,
):
    me = tl.program_id(0)
    lane = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + lane, lane < E, 0)
    counts = tl.minimum(tl.maximum(counts, 0), max_tokens)
    padded = tl.cdiv(counts, block_size) * block_size
    start = tl.sum(tl.where(lane < me, padded, 0))
    count = tl.sum(tl.where(lane == me, counts, 0))
    end = start + tl.cdiv(count, block_size) * block_size
    used = tl.sum(padded)
    for first in range(0, count, 128):
        row = first + tl.arange(0, 128)
        tl.store(sorted_ptr + start + row, me * max_tokens + row, row < count)
    fill_range(sorted_ptr, E * max_tokens, start + count, end, 128)
    fill_range(expert_ids_ptr, me, start // block_size, end // block_size, 32)
    share = tl.cdiv(P - used, E)
    last = tl.minimum(used + (me + 1) * share, P)
    fill_range(sorted_ptr, E * max_tokens, used + me * share, last, 128)
    if me == 0:
        tl.store(num_post_ptr, used)
        fill_range(expert_ids_ptr, -1, used // block_size, P // block_size, 128)


_launch_count = Launcher(count_kernel)
_launch_remap = Launcher(remap_kernel)
_launch_batched_align = Launcher(batched_align_kernel)


def count(
    ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None
) -> torch.Tensor:
    counts = torch.empty(num_local_experts, dtype=torch.int32, device=ids.device)
    block = min(4096, power_of_2(max(32, ids.numel())))
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    _launch_count(
        (num_local_experts, 1),
        (ids, expert_map, counts),
        (ids.numel(), num_mapped, num_local_experts),
        (block,),
        max(1, min(8, block // 256)),
    )
    return counts


def remap(topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    ids = topk_ids.contiguous()
    out = torch.empty_like(ids)
    R = ids.numel()
    if R:
        sizes = (R, expert_map.shape[0], ANY_EXPERT)
        _launch_remap((-(-R // 1024), 1), (ids, expert_map, out), sizes, (1024,), 4)
    return out


def batched_align(
    max_tokens: int, block_size: int, expert_num_tokens: torch.Tensor, P: int
) -> MoEAlignment:
    E = expert_num_tokens.shape[0]
    alignment = MoEAlignment.empty(P, block_size, expert_num_tokens.device)
    _launch_batched_align(
        (E, 1),
        (expert_num_tokens, *alignment),
        (max_tokens, P, block_size, E),
        (power_of_2(E),),
        1,
    )
    return alignment
