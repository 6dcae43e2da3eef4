"""Rows to their experts' ranks, by stores into the peers' memory.

One host, one process per GPU (``peer_flags``). Token t of rank r has slot r * rows + t everywhere,
so nothing has to be counted or negotiated. A row crosses the wire once per rank, not once per pick.

dispatch_kernel  grid (programs,): a task is (slot of this rank, BLOCK columns). For each rank it
                 writes the slot's ids (-1 where the expert lives elsewhere) and weights, and the
                 columns if any pick is there, rounded with a scale for each GROUP of them unless
                 that is 0 (one for the row: BLOCK = GROUP >= H). The program that finishes last
                 raises this rank's flag at every rank, and with WAIT stays until all ranks have
                 raised theirs here.
                 COPIED: the copy engines bring the rows. Only those that are to be rounded are
                 written, all of them, into this rank's own buffer, from where they are taken.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.peer_layout import PeerView
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.kernels.triton.peer_flags import (
    STATE_COMBINE,
    STATE_DISPATCH,
    STATE_DONE,
    TYPES,
    peer_pointer,
    raise_flags,
    wait_for_flags,
)
from fusedmoe.kernels.triton.quantize import (
    LEAST,
    LEAST_OF_ROW,
    largest_magnitude,
    quantized,
    scale_from,
)
from fusedmoe.tuning.peer_tiles import PeerTiles


@triton.jit
def owners_of(ids_ptr, owners_ptr, token, T, num_experts, K: tl.constexpr, K2: tl.constexpr):
    """(ids, ranks) [K2] of a token's picks; -1 where there is none."""
    pick = tl.arange(0, K2)
    ids = tl.load(ids_ptr + token.to(tl.int64) * K + pick, (pick < K) & (token < T), -1)
    known = (ids >= 0) & (ids < num_experts)
    owners = tl.load(owners_ptr + ids, known, -1)
    return tl.where(known, ids, -1).to(tl.int32), owners


@triton.jit
def dispatch_kernel(
    x_ptr,
    ids_ptr,
    weights_ptr,
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
    rows_at,
    scales_at,
    ids_at,
    weights_at,
    flags_at,
    row_flags_at,
    timeout_us,
    K: tl.constexpr,
    K2: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    E8M0: tl.constexpr,
    row_dtype: tl.constexpr,
    COPIED: tl.constexpr,
    WAIT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    epoch = tl.load(state_ptr + STATE_DISPATCH)
    ROWS: tl.constexpr = GROUP > 0 or not COPIED
    parts = tl.cdiv(H, BLOCK)
    pick = tl.arange(0, K2)
    for task in range(tl.program_id(0), rows * parts, tl.num_programs(0)):
        token, part = task // parts, task % parts
        slot = token.to(tl.int64) + me * rows
        ids, owners = owners_of(ids_ptr, owners_ptr, token, T, num_experts, K, K2)
        weights = tl.load(weights_ptr + token.to(tl.int64) * K + pick, ids >= 0, 0.0)
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = (column < H) & (token < T) & ROWS
        row = tl.load(x_ptr + token.to(tl.int64) * stride_t + column, inside, 0.0)
        if GROUP > 0:
            groups = tl.reshape(row.to(tl.float32), (BLOCK // GROUP, GROUP))
            scales = scale_from(largest_magnitude(groups, 1), row_dtype, E8M0, FLOOR)
            sent = tl.reshape(quantized(groups, scales[:, None], row_dtype), (BLOCK,))
            group = part * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        else:
            sent = row
        for rank in tl.static_range(WORLD):
            here = owners == rank
            if part == 0:
                meta = slot * K + pick
                there_ids = peer_pointer(bases_ptr, rank, ids_at, tl.int32)
                tl.store(there_ids + meta, tl.where(here, ids, -1), pick < K)
                there_weights = peer_pointer(bases_ptr, rank, weights_at, tl.float32)
                tl.store(there_weights + meta, weights, here)
            wanted = rank == me if COPIED else tl.max(here.to(tl.int32), axis=0) > 0
            if ROWS & wanted:
                there = peer_pointer(bases_ptr, rank, rows_at, row_dtype)
                tl.store(there + slot * H + column, sent, inside)
                if GROUP > 0:
                    there_scales = peer_pointer(bases_ptr, rank, scales_at, tl.float32)
                    tl.store(
                        there_scales + slot * tl.cdiv(H, GROUP) + group, scales, group * GROUP < H
                    )
    tl.debug_barrier()
    done = tl.atomic_add(state_ptr + STATE_DONE, 1, sem="acq_rel", scope="gpu")
    if done == tl.num_programs(0) - 1:
        raise_flags(bases_ptr, epoch, flags_at, me, WORLD)
        tl.store(state_ptr + STATE_DONE, 0)
        tl.store(state_ptr + STATE_COMBINE, epoch)
        tl.store(state_ptr + STATE_DISPATCH, epoch + 1)
        if COPIED:
            tl.store(peer_pointer(bases_ptr, me, row_flags_at, tl.int32) + me, epoch)
        if WAIT:
            wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, timeout_us, me, WORLD)


_dispatch = Launcher(dispatch_kernel, chained=True)


def dispatch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    owners: torch.Tensor,
    here: PeerView,
    rows: int,
    tiles: PeerTiles,
    timeout_us: int,
    wait: bool,
    copied: bool,
) -> None:
    (T, H), K, layout = x.shape, topk_ids.shape[1], here.layout
    block, rounding = tiles.block, (0, 0.0, False)
    if layout.key is not None:
        columns = layout.key.group_shape.col
        group = power_of_2(H) if columns == -1 else columns
        of_row = columns == -1 and layout.row_dtype is not torch.int8
        floor = LEAST_OF_ROW.value if of_row else LEAST.value
        block, rounding = max(block, group), (group, floor, layout.key.scale_kind == "e8m0")
    elif copied:  # a task per token: no row is sent
        block = power_of_2(H)
    tasks = rows * -(-H // block)
    _dispatch(
        tiles.grid(tasks),
        (x, topk_ids, topk_weights, owners, here.bases, here.state, here.error),
        (
            *(T, rows, H, x.stride(0), owners.shape[0], here.rank),
            *(layout.rows_at, layout.scales_at, layout.ids_at, layout.weights_at),
            *(layout.dispatch_flags_at, layout.row_flags_at, timeout_us),
        ),
        (
            *(K, power_of_2(K), layout.world, block, *rounding),
            *(TYPES[layout.row_dtype], copied, wait),
        ),
        tiles.num_warps,
    )
