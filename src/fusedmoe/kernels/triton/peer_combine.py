"""The sums of each token's ranks back at its own, by loads from the peers' memory.

combine_kernel   grid (programs,): raises the flag that this rank's outputs are ready, if ANNOUNCE,
                 and waits for the others', then adds up each token's rows, in the order of the
                 ranks, in fp32: out of the peers' memory, or with SENT out of its own
                 (``peer_sums`` has brought them). A rank without tokens waits too: its next
                 dispatch writes what others read.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.peer_layout import PeerView
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.kernels.triton.peer_dispatch import owners_of
from fusedmoe.kernels.triton.peer_flags import (
    STATE_COMBINE,
    TYPES,
    raise_flags,
    wait_for_flags,
)
from fusedmoe.tuning.peer_tiles import PeerTiles


@triton.jit
def combine_kernel(
    out_ptr,
    ids_ptr,
    owners_ptr,
    bases_ptr,
    state_ptr,
    error_ptr,
    T,
    rows,
    H,
    stride_t,
    num_experts,
    me,
    outputs_at,
    flags_at,
    timeout_us,
    K: tl.constexpr,
    K2: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    row_dtype: tl.constexpr,
    ANNOUNCE: tl.constexpr,
    SENT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    epoch = tl.load(state_ptr + STATE_COMBINE)
    # Before the wait, which empties the L1: the addresses would come a trip to the L2 later.
    everyone = tl.arange(0, WORLD)
    starts = tl.load(bases_ptr + everyone) + outputs_at
    if ANNOUNCE & (tl.program_id(0) == 0):
        raise_flags(bases_ptr, epoch, flags_at, me, WORLD)
    if T == 0:
        wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, timeout_us, me, WORLD)
    parts = tl.cdiv(H, BLOCK)
    for task in range(tl.program_id(0), T * parts, tl.num_programs(0)):
        token, part = task // parts, task % parts
        _, owners = owners_of(ids_ptr, owners_ptr, token, T, num_experts, K, K2)
        if task < tl.num_programs(0):
            wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, timeout_us, me, WORLD)
            tl.debug_barrier()
        column = part * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for rank in tl.static_range(WORLD):
            used = tl.max((owners == rank).to(tl.int32), axis=0) > 0
            slot = token.to(tl.int64) + (rank if SENT else me) * rows
            start = tl.sum(tl.where(everyone == (me if SENT else rank), starts, 0), axis=0)
            there = tl.multiple_of(start.to(tl.pointer_type(row_dtype)), 16)
            row = tl.load(there + slot * H + column, (column < H) & used, 0.0)
            total += row.to(tl.float32)
        tl.store(out_ptr + token.to(tl.int64) * stride_t + column, total, column < H)


_combine = Launcher(combine_kernel, chained=True)


def combine(
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    owners: torch.Tensor,
    here: PeerView,
    rows: int,
    tiles: PeerTiles,
    timeout_us: int,
    announce: bool,
    sent: bool,
) -> None:
    (T, H), K, layout = out.shape, topk_ids.shape[1], here.layout
    tasks = T * -(-H // tiles.block)
    _combine(
        tiles.grid(tasks),
        (out, topk_ids, owners, here.bases, here.state, here.error),
        (
            *(T, rows, H, out.stride(0), owners.shape[0], here.rank),
            *(layout.outputs_at, layout.combine_flags_at, timeout_us),
        ),
        (
            *(K, power_of_2(K), layout.world, tiles.block),
            *(TYPES[layout.dtype], announce, sent),
        ),
        tiles.num_warps,
    )
