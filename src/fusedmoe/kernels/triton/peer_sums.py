"""The weighted sum over K picks, stored into the memory of the rank whose token it is.

Grid (world * rows * cdiv(H, BLOCK),): a program owns BLOCK columns of one slot. Neighbouring
programs serve different ranks, and a rank begins with itself, so that at any time all wires are in
use and no rank is sent to by all others.

y rows of H columns, stride_y apart; position int32 [R] or None; weights fp32 [S, K] or None; ids
[S, K], expert_map [global] or None -> outputs [world, rows, H] at ``outputs_at`` of the peers'
buffers (``kernels.peer_layout``). fp32, one fixed order. A slot without a live pick is not stored.

Of a token's picks most are other ranks': a program goes from one that is here to the next. To load
all of them, under masks, took twice as long as the memory (761 us for 8192 tokens of each of four
ranks, 7168 columns; 368 now).
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
    row = slot
    if position_ptr is not None:
        row = tl.load(position_ptr + slot, there, 0, cache_modifier=".cg").to(tl.int64)
    expert = tl.load(ids_ptr + slot, there, -1)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + slot, there, 0.0).to(tl.float32)
    live = (local_expert(expert, map_ptr, num_mapped, num_local) >= 0).to(tl.int32)
    if tl.max(live, axis=0) > 0:
        inside = column < H
        total = tl.zeros([BLOCK], tl.float32)
        WORD: tl.constexpr = PICKS < 32
        chosen = tl.sum(live << pick, 0) if WORD else 0
        for one in tl.static_range(PICKS):
            if ((chosen >> one) & 1) if WORD else tl.sum(tl.where(pick == one, live, 0), 0):
                at = tl.sum(tl.where(pick == one, row, 0), 0) * stride_y
                picked = tl.load(y_ptr + at + column, inside, 0.0, cache_modifier=".cg")
                picked = picked.to(tl.float32)
                if weights_ptr is not None:
                    picked *= tl.sum(tl.where(pick == one, weights, 0.0), 0)
                total += picked
        target = peer_pointer(bases_ptr, home, outputs_at, row_dtype)
        tl.store(target + (me * rows + token) * H + column, total, inside)


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
    block, num_warps = sum_tile(H)
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
