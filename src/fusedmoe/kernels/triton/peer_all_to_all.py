"""Rows to their experts' ranks and their sums back, by loads and stores into the peers' memory.

One host, one process per GPU; every rank owns a buffer that all others can address (``bases``
int64 [WORLD]: where they lie for this rank). Token t of rank r has slot r * rows + t everywhere,
so nothing has to be counted or negotiated. A row crosses the wire once per rank, not once per pick.

dispatch_kernel  grid (programs,): a task is (slot of this rank, BLOCK columns). For each rank it
                 writes the slot's ids (-1 where the expert lives elsewhere) and weights, and the
                 columns if any pick is there, rounded with a scale for each GROUP of them unless
                 that is 0 (one for the row: BLOCK = GROUP >= H). The program that finishes last
                 raises this rank's flag at every rank, and with WAIT stays until all ranks have
                 raised theirs here.
announce_kernel  grid (1,): raises the flag that this rank's outputs are ready.
wait_kernel      grid (1,): waits for the others' flags of either kind, and keeps no more of the
                 GPU than that from what runs meanwhile.
combine_kernel   grid (programs,): raises that flag, if ANNOUNCE, and waits for the others', then
                 adds up each token's rows, in the order of the ranks, in fp32: out of the peers'
                 memory, or with SENT out of its own (``peer_sums`` has brought them). A rank
                 without tokens waits too: its next dispatch writes what others read.

Flags hold an epoch, which lives in ``state`` on the device so that a graph can be replayed: a
dispatch takes STATE_DISPATCH and hands it to the combine, whose last program moves it on. A rank
sends its next dispatch only after its combine, which waits for every other rank's experts; so no
buffer is written while somebody still reads it.

Waits end after ``max_polls`` looks: the rank that is missing is written, plus one, to ``error``
(pinned host memory) and to ``state``, after which nothing waits any more.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.peer_layout import PeerView
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.kernels.triton.quantize import (
    LEAST,
    LEAST_OF_ROW,
    largest_magnitude,
    quantized,
    scale_from,
)
from fusedmoe.tuning.peer_tiles import PeerTiles

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.int8: tl.int8,
}

STATE_DISPATCH = tl.constexpr(0)
STATE_COMBINE = tl.constexpr(1)
STATE_ERROR = tl.constexpr(2)
STATE_DONE = tl.constexpr(3)


@triton.jit
def peer_pointer(bases_ptr, rank, offset, dtype: tl.constexpr):
    """Where a section of ``rank``'s buffer begins, as a pointer to ``dtype``."""
    address = tl.load(bases_ptr + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def wait_for_flags(
    bases_ptr, state_ptr, error_ptr, epoch, flags_at, max_polls, me, WORLD: tl.constexpr
):
    """Until every rank's flag in this rank's buffer shows ``epoch``."""
    rank = tl.arange(0, WORLD)
    flags_ptr = peer_pointer(bases_ptr, me, flags_at, tl.int32) + rank
    broken = tl.load(state_ptr + STATE_ERROR)
    late = tl.atomic_add(flags_ptr, 0, sem="acquire", scope="sys") != epoch
    polls = 0
    while (tl.max(late.to(tl.int32), axis=0) > 0) & (polls < max_polls) & (broken == 0):
        late = tl.atomic_add(flags_ptr, 0, sem="acquire", scope="sys") != epoch
        polls += 1
    missing = tl.max(tl.where(late, rank + 1, 0), axis=0)
    if (missing > 0) & (broken == 0):
        tl.store(state_ptr + STATE_ERROR, missing)
        tl.store(error_ptr, missing)


@triton.jit
def raise_flags(bases_ptr, epoch, flags_at, me, WORLD: tl.constexpr):
    """Show ``epoch`` at every rank, after everything that this program knows to be written."""
    there = tl.load(bases_ptr + tl.arange(0, WORLD)) + flags_at
    flags_ptr = there.to(tl.pointer_type(tl.int32)) + me
    tl.atomic_xchg(flags_ptr, epoch, sem="release", scope="sys")


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
    max_polls,
    K: tl.constexpr,
    K2: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    E8M0: tl.constexpr,
    row_dtype: tl.constexpr,
    WAIT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    epoch = tl.load(state_ptr + STATE_DISPATCH)
    parts = tl.cdiv(H, BLOCK)
    pick = tl.arange(0, K2)
    for task in range(tl.program_id(0), rows * parts, tl.num_programs(0)):
        token, part = task // parts, task % parts
        slot = token.to(tl.int64) + me * rows
        ids, owners = owners_of(ids_ptr, owners_ptr, token, T, num_experts, K, K2)
        weights = tl.load(weights_ptr + token.to(tl.int64) * K + pick, ids >= 0, 0.0)
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = (column < H) & (token < T)
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
            if tl.max(here.to(tl.int32), axis=0) > 0:
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
        tl.store(state_ptr + STATE_DONE, 0)
        tl.store(state_ptr + STATE_COMBINE, epoch)
        raise_flags(bases_ptr, epoch, flags_at, me, WORLD)
        if WAIT:
            wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, max_polls, me, WORLD)


@triton.jit
def announce_kernel(bases_ptr, state_ptr, flags_at, me, WORLD: tl.constexpr):
    raise_flags(bases_ptr, tl.load(state_ptr + STATE_COMBINE), flags_at, me, WORLD)


@triton.jit
def wait_kernel(bases_ptr, state_ptr, error_ptr, flags_at, max_polls, me, WORLD: tl.constexpr):
    epoch = tl.load(state_ptr + STATE_COMBINE)
    wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, max_polls, me, WORLD)


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
    max_polls,
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
    if ANNOUNCE & (tl.program_id(0) == 0):
        raise_flags(bases_ptr, epoch, flags_at, me, WORLD)
    if T == 0:
        wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, max_polls, me, WORLD)
    parts = tl.cdiv(H, BLOCK)
    for task in range(tl.program_id(0), T * parts, tl.num_programs(0)):
        token, part = task // parts, task % parts
        _, owners = owners_of(ids_ptr, owners_ptr, token, T, num_experts, K, K2)
        if task < tl.num_programs(0):
            wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, max_polls, me, WORLD)
            tl.debug_barrier()
        column = part * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for rank in tl.static_range(WORLD):
            used = tl.max((owners == rank).to(tl.int32), axis=0) > 0
            if SENT:
                slot = token.to(tl.int64) + rank * rows
                there = peer_pointer(bases_ptr, me, outputs_at, row_dtype)
            else:
                slot = token.to(tl.int64) + me * rows
                there = peer_pointer(bases_ptr, rank, outputs_at, row_dtype)
            row = tl.load(there + slot * H + column, (column < H) & used, 0.0)
            total += row.to(tl.float32)
        tl.store(out_ptr + token.to(tl.int64) * stride_t + column, total, column < H)
    done = tl.atomic_add(state_ptr + STATE_DONE, 1, sem="acq_rel", scope="gpu")
    if done == tl.num_programs(0) - 1:
        tl.store(state_ptr + STATE_DONE, 0)
        tl.store(state_ptr + STATE_DISPATCH, epoch + 1)


_dispatch = Launcher(dispatch_kernel, chained=True)
_announce = Launcher(announce_kernel)
_wait = Launcher(wait_kernel)
_combine = Launcher(combine_kernel, chained=True)


def dispatch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    owners: torch.Tensor,
    here: PeerView,
    rows: int,
    tiles: PeerTiles,
    max_polls: int,
    wait: bool,
) -> None:
    (T, H), K, layout = x.shape, topk_ids.shape[1], here.layout
    block, rounding = tiles.block, (0, 0.0, False)
    if layout.key is not None:
        columns = layout.key.group_shape.col
        group = power_of_2(H) if columns == -1 else columns
        of_row = columns == -1 and layout.row_dtype is not torch.int8
        floor = LEAST_OF_ROW.value if of_row else LEAST.value
        block, rounding = max(block, group), (group, floor, layout.key.scale_kind == "e8m0")
    tasks = rows * -(-H // block)
    _dispatch(
        (max(1, min(tasks, tiles.programs)), 1),
        (x, topk_ids, topk_weights, owners, here.bases, here.state, here.error),
        (
            *(T, rows, H, x.stride(0), owners.shape[0], here.rank),
            *(layout.rows_at, layout.scales_at, layout.ids_at, layout.weights_at),
            *(layout.dispatch_flags_at, max_polls),
        ),
        (K, power_of_2(K), layout.world, block, *rounding, TYPES[layout.row_dtype], wait),
        tiles.num_warps,
    )


def announce(here: PeerView) -> None:
    _announce(
        (1, 1),
        (here.bases, here.state),
        (here.layout.combine_flags_at, here.rank),
        (here.layout.world,),
        1,
    )


def wait(here: PeerView, flags_at: int, max_polls: int) -> None:
    _wait(
        (1, 1),
        (here.bases, here.state, here.error),
        (flags_at, max_polls, here.rank),
        (here.layout.world,),
        1,
    )


def combine(
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    owners: torch.Tensor,
    here: PeerView,
    rows: int,
    tiles: PeerTiles,
    max_polls: int,
    announce: bool,
    sent: bool,
) -> None:
    (T, H), K, layout = out.shape, topk_ids.shape[1], here.layout
    tasks = T * -(-H // tiles.block)
    _combine(
        (max(1, min(tasks, tiles.programs)), 1),
        (out, topk_ids, owners, here.bases, here.state, here.error),
        (
            *(T, rows, H, out.stride(0), owners.shape[0], here.rank),
            *(layout.outputs_at, layout.combine_flags_at, max_polls),
        ),
        (
            *(K, power_of_2(K), layout.world, tiles.block),
            *(TYPES[layout.dtype], announce, sent),
        ),
        tiles.num_warps,
    )
