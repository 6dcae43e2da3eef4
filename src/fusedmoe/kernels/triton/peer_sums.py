"""The weighted sum over K picks, stored into the memory of the rank whose token it is.

Grid (world * rows * cdiv(H, BLOCK),): a program owns BLOCK columns of one slot. Neighbouring
programs serve different ranks, and a rank begins with itself, so that at any time all wires are in
use and no rank is sent to by all others.

y rows of H columns, stride_y apart; position int32 [R] or None; weights fp32 [S, K] or None; ids
[S, K], expert_map [global] or None -> outputs [world, rows, H] at ``outputs_at`` of the peers'
buffers (``kernels.peer_layout``). fp32, one fixed order. A slot without a live pick is not stored.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.peer_layout import PeerView
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.kernels.triton.mul_sum import ANY_EXPERT
from fusedmoe.kernels.triton.peer_flags import TYPES, peer_pointer
from fusedmoe.tuning.peer_tiles import sum_tile


@triton.jit
def send_sums_kernel(
    y_ptr,
    weights_ptr,
    position_ptr,
    ids_ptr,
    map_ptr,
    bases_ptr,
    rows,
    H,
    stride_y,
    num_mapped,
    num_local,
    me,
    outputs_at,
    PICKS: tl.constexpr,
    PADDED_PICKS: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    row_dtype: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    parts = tl.cdiv(H, BLOCK)
    home = (tl.program_id(0) + me) % WORLD
    token = (tl.program_id(0) // WORLD // parts).to(tl.int64)
    column = tl.program_id(0) // WORLD % parts * BLOCK + tl.arange(0, BLOCK)
    pick = tl.arange(0, PADDED_PICKS)
    slot = (home * rows + token) * PICKS + pick
    there = pick < PICKS
    # Nobody wrote the row of a slot without an expert; it is asked for before that is known.
    row = slot
    if position_ptr is not None:
        row = tl.load(position_ptr + slot, there, 0, cache_modifier=".cg")
    expert = tl.load(ids_ptr + slot, there, -1)
    live = local_expert(expert, map_ptr, num_mapped, num_local) >= 0
    if tl.max(live.to(tl.int32), axis=0) > 0:
        at = tl.where(live, row, 0).to(tl.int64)[:, None] * stride_y + column[None, :]
        wanted = live[:, None] & (column < H)[None, :]
        picked = tl.load(y_ptr + at, wanted, 0.0, cache_modifier=".cg").to(tl.float32)
        if weights_ptr is not None:
            picked *= tl.load(weights_ptr + slot, live, 0.0).to(tl.float32)[:, None]
        total = tl.sum(tl.where(live[:, None], picked, 0.0), 0)
        target = peer_pointer(bases_ptr, home, outputs_at, row_dtype)
        tl.store(target + (me * rows + token) * H + column, total, column < H)


_launch = Launcher(send_sums_kernel, chained=True)


def send_sums(
    here: PeerView,
    rows: int,
    y: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_local_experts: int | None,
    position: torch.Tensor | None,
) -> None:
    (S, K), H, layout = topk_ids.shape, y.shape[1], here.layout
    block, num_warps = sum_tile(H, K)
    _launch(
        (S * -(-H // block), 1),
        (y, topk_weights, position, topk_ids, expert_map, here.bases),
        (
            *(rows, H, y.stride(0), 0 if expert_map is None else expert_map.shape[0]),
            *(ANY_EXPERT if num_local_experts is None else num_local_experts, here.rank),
            layout.outputs_at,
        ),
        (K, power_of_2(K), layout.world, block, TYPES[layout.dtype]),
        num_warps,
    )
