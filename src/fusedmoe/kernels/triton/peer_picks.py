"""Each token's rows of picks, pushed here by the ranks of its experts, weighted and added up.

add_picks_kernel  grid (programs,): as ``peer_combine.combine_kernel``, out of this rank's own
                  buffer: rows [rows, K, H] at ``picks_at`` from the ranks whose kind says so, sums
                  [world, rows, H] at ``outputs_at`` from the others. All rows of a token are asked
                  for at once: rows of one GPU's sum have the same order and the same bits.
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
    peer_pointer,
    raise_flags,
    tell_kind,
    wait_for_flags,
)
from fusedmoe.tuning.peer_tiles import PeerTiles


@triton.jit
def add_picks_kernel(
    out_ptr,
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
    pushed,
    outputs_at,
    picks_at,
    flags_at,
    kinds_at,
    timeout_us,
    K: tl.constexpr,
    K2: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    row_dtype: tl.constexpr,
    ANNOUNCE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    epoch = tl.load(state_ptr + STATE_COMBINE)
    if ANNOUNCE & (tl.program_id(0) == 0):
        tell_kind(bases_ptr, pushed, kinds_at, me, WORLD)
        raise_flags(bases_ptr, epoch, flags_at, me, WORLD)
    if T == 0:
        wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, timeout_us, me, WORLD)
    parts = tl.cdiv(H, BLOCK)
    pick = tl.arange(0, K2)
    kinds = peer_pointer(bases_ptr, me, kinds_at, tl.int32)
    outputs = peer_pointer(bases_ptr, me, outputs_at, row_dtype)
    picks = peer_pointer(bases_ptr, me, picks_at, row_dtype)
    for task in range(tl.program_id(0), T * parts, tl.num_programs(0)):
        token, part = (task // parts).to(tl.int64), task % parts
        _, owners = owners_of(ids_ptr, owners_ptr, token, T, num_experts, K, K2)
        if weights_ptr is not None:
            weights = tl.load(weights_ptr + token * K + pick, pick < K, 0.0)
        if task < tl.num_programs(0):
            wait_for_flags(bases_ptr, state_ptr, error_ptr, epoch, flags_at, timeout_us, me, WORLD)
            tl.debug_barrier()
        live = owners >= 0
        rowwise = tl.load(kinds + owners, live, 0, cache_modifier=".cg") > 0
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = column < H
        at = (token * K + pick)[:, None] * H + column[None, :]
        values = tl.load(picks + at, rowwise[:, None] & inside[None, :], 0.0).to(tl.float32)
        if weights_ptr is not None:
            values *= weights[:, None]
        # The choice keeps product and sum from being contracted, as in a sum on one GPU.
        total = tl.sum(tl.where(rowwise[:, None], values, 0.0), 0)
        if tl.max((live & ~rowwise).to(tl.int32), axis=0) > 0:
            for rank in tl.static_range(WORLD):
                used = tl.max(((owners == rank) & ~rowwise).to(tl.int32), axis=0) > 0
                row = tl.load(outputs + (token + rank * rows) * H + column, inside & used, 0.0)
                total += row.to(tl.float32)
        tl.store(out_ptr + token * stride_t + column, total, inside)


_add_picks = Launcher(add_picks_kernel, chained=True)


def add_picks(
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    owners: torch.Tensor,
    here: PeerView,
    rows: int,
    tiles: PeerTiles,
    timeout_us: int,
    announce: bool,
    pushed: bool,
) -> None:
    (T, H), K, layout = out.shape, topk_ids.shape[1], here.layout
    tasks = T * -(-H // tiles.block)
    _add_picks(
        tiles.grid(tasks),
        (out, topk_ids, topk_weights, owners, here.bases, here.state, here.error),
        (
            *(T, rows, H, out.stride(0), owners.shape[0], here.rank, int(pushed)),
            *(layout.outputs_at, layout.picks_at(rows)),
            *(layout.combine_flags_at, layout.kinds_at, timeout_us),
        ),
        (
            *(K, power_of_2(K), layout.world, tiles.block),
            *(TYPES[layout.dtype], announce),
        ),
        tiles.num_warps,
    )
