"""Many rows per expert on Hopper: two persistent grouped GEMMs, warp specialised, and a sum.

A tile is 128 rows of one expert (a block of ``moe_align_block_size``) by 2 x 128 weight rows. Four
or one producer warps fill a ring of STAGES steps of 64 columns: weights by TMA, token rows gathered
by cp.async (up) or read as a matrix by TMA (down). Two consumer warpgroups own 64 rows each, share
the weights of a step and run apart by up to STAGES steps, so that the epilogue of one overlaps the
products of the other. A warpgroup whose rows are all padding multiplies nothing.

up_kernel    grid (programs,): x [T, H], w1 -> act [P, I], rows in the order of ``sorted_ids``;
             and position [R]: where a slot's row is.
down_kernel  grid (programs,): act [P, I], w2 -> y [P, H], rows as in act.
sum_kernel   grid (T, cdiv(H, SPANS * BLOCK)): y, weights, position -> out [T, H] in fp32, one fixed
             order; y may be undefined afterwards. sum_few_kernel where most slots are other ranks'.

Tiles are drawn from a counter, because those of half-empty blocks are done sooner: in groups of
an expert's blocks, GROUP at most, that share weights in the L2. The producer announces them to the
consumers. The second half of a block with at most 64 rows is not loaded.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.align_arrivals import Arrivals
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.peer_layout import PeerSums, taker_of_picks
from fusedmoe.kernels.peer_sums import send_sums
from fusedmoe.kernels.triton.discarded import discard_rows, may_discard
from fusedmoe.kernels.triton.hopper_arrivals import arrival_arguments
from fusedmoe.kernels.triton.hopper_launch import (
    HopperLauncher,
    kept,
    matrix_descriptor,
    task_counters,
    weight_views,
)
from fusedmoe.kernels.triton.hopper_prefill_common import HALF_M, TILE_N, Case
from fusedmoe.kernels.triton.hopper_prefill_down import down_kernel
from fusedmoe.kernels.triton.hopper_prefill_up import up_kernel
from fusedmoe.kernels.triton.hopper_pushed import push_arguments
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.hopper_tiles import MOST_SUM_COLUMNS, SUM_COLUMNS, PrefillTiles, sum_passes


@triton.jit
def sum_kernel(
    y_ptr,
    weights_ptr,
    position_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    H,
    stride_out,
    num_mapped,
    num_local,
    PICKS: tl.constexpr,
    PADDED_PICKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
    DISCARD: tl.constexpr,
    CHAINED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pick = tl.arange(0, PADDED_PICKS)
    slot = token * PICKS + pick
    there = pick < PICKS
    # All but y was complete before down_kernel let this launch begin. Nobody wrote the row of a
    # slot without an expert; it is asked for before that is known.
    row = tl.load(position_ptr + slot, there, 0, cache_modifier=".cg")
    expert = tl.load(ids_ptr + slot, there, -1, cache_modifier=".cg")
    weight = tl.zeros([PADDED_PICKS], tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + slot, there, 0.0, cache_modifier=".cg").to(tl.float32)
    live = local_expert(expert, map_ptr, num_mapped, num_local) >= 0
    row = tl.where(live, row, 0).to(tl.int64)
    follow_previous(CHAINED)
    for span in tl.static_range(SPANS):
        column = (tl.program_id(1) * SPANS + span) * BLOCK + tl.arange(0, BLOCK)
        wanted = live[:, None] & (column < H)[None, :]
        at = row[:, None] * H + column[None, :]
        rows = tl.load(y_ptr + at, wanted, 0.0, cache_modifier=".cg").to(tl.float32)
        if weights_ptr is not None:
            rows *= weight[:, None]
        # As hopper_decode's sum, to the bit: the choice keeps them from being contracted.
        total = tl.sum(tl.where(live[:, None], rows, 0.0), 0)
        tl.store(out_ptr + token * stride_out + column, total, column < H)
        if DISCARD:
            tl.debug_barrier()
            first = (tl.program_id(1) * SPANS + span) * BLOCK
            discard_rows(y_ptr, row, live, first, H, BLOCK)


@triton.jit
def sum_few_kernel(
    y_ptr,
    weights_ptr,
    position_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    H,
    stride_out,
    num_mapped,
    num_local,
    PICKS: tl.constexpr,
    PADDED_PICKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    pick = tl.arange(0, PADDED_PICKS)
    slot = token * PICKS + pick
    there = pick < PICKS
    expert = tl.load(ids_ptr + slot, there, -1)
    place = tl.load(position_ptr + slot, there, 0, cache_modifier=".cg")
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + slot, there, 0.0).to(tl.float32)
    live = local_expert(expert, map_ptr, num_mapped, num_local) >= 0
    chosen = tl.sum(tl.where(live, 1 << pick, 0), 0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros([BLOCK], tl.float32)
    for one in tl.static_range(PICKS):
        if (chosen >> one) & 1:
            row = tl.sum(tl.where(pick == one, place, 0), 0).to(tl.int64)
            values = tl.load(y_ptr + row * H + column, inside, 0.0, cache_modifier=".cg")
            values = values.to(tl.float32)
            if weights_ptr is not None:
                values *= tl.sum(tl.where(pick == one, weights, 0.0), 0)
            # The choice keeps product and sum from being contracted, as in sum_kernel.
            total += tl.where(inside, values, 0.0)
    tl.store(out_ptr + token * stride_out + column, total, inside)


_launch_up = HopperLauncher(up_kernel)
_launch_down = HopperLauncher(down_kernel)
_case = kept(Case)
_launch_sum = Launcher(sum_kernel, chained=True)
_launch_sum_few = Launcher(sum_few_kernel, chained=True)


def prefill(
    layer: LayerTensors[torch.Tensor],
    tables: MoEAlignment,
    tiles: PrefillTiles,
    arrivals: Arrivals | None = None,
) -> None:
    """Launch the three kernels; the layer as checked by ``kernels.hopper_prefill``."""
    ids, taker = layer.topk_ids, taker_of_picks(layer.out)
    position = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    prefill_gemms(layer, position, tables, tiles, arrivals, taker)
    if taker is not None:
        taker.sent = taker.pushed = True
        return
    sum_rows(layer, position, sum_passes(layer.w2.shape[1]))


def sum_rows(
    layer: LayerTensors[torch.Tensor] | LayerTensors[QuantizedTensor],
    position: torch.Tensor,
    passes: tuple[int, int] = (SUM_COLUMNS, 1),
) -> None:
    """The layer's out [T, H]: the rows of y [P, H] at each token's positions int32 [R], weighted,
    in one fixed order.

    ``passes``: how many columns of a token a program sums at a time, and how often. Where few
    slots are local it takes more, and goes from one local slot to the next instead of loading all
    at once. An ``out`` that is ``PeerSums`` goes to the tokens' ranks.
    """
    _, _, _, topk_weights, topk_ids, out, _, y, _ = layer[:9]
    (T, K), (num_local, H, _), expert_map = topk_ids.shape, layer.w2.shape, layer.expert_map
    if isinstance(out, PeerSums):
        send_sums(out, y, topk_weights, topk_ids, expert_map, num_local, position)
        return
    if expert_map is not None and 2 * num_local <= expert_map.shape[0] and K < 32:
        block = power_of_2(H) if H <= MOST_SUM_COLUMNS else MOST_SUM_COLUMNS // 2
        _launch_sum_few(
            (T, -(-H // block)),
            (y, topk_weights, position, topk_ids, expert_map, out),
            (H, out.stride(0), expert_map.shape[0], num_local),
            (K, power_of_2(K), block),
            4,
        )
        return
    columns, spans = passes
    _launch_sum(
        (T, -(-H // (columns * spans))),
        (y, topk_weights, position, topk_ids, expert_map, out),
        (H, out.stride(0), 0 if expert_map is None else expert_map.shape[0], num_local),
        (K, power_of_2(K), columns, spans, may_discard(y, T * K)),
        columns // 256,
    )


def prefill_gemms(
    layer: LayerTensors[torch.Tensor],
    position: torch.Tensor,
    tables: MoEAlignment,
    tiles: PrefillTiles,
    arrivals: Arrivals | None = None,
    taker: PeerSums | None = None,
) -> None:
    """up_kernel and down_kernel alone: the layer's y [P, H], rows in the order of the tables, and
    position int32 [R], where each slot's row is. ``task_counters`` says what the table of slots
    must have. ``arrivals``: rows of x may be on their way. With ``taker`` rows go there instead of
    into y. What would weight and sum them is not looked at."""
    x, w1, w2, _, topk_ids, _, act, y, programs = layer[:9]
    activation = layer.epilogue
    e, H, I = w2.shape  # noqa: E741
    R = position.shape[0]
    sorted_ids, expert_ids, num_post = tables
    up_counter, down_counter = task_counters(sorted_ids, act.shape[0])
    stored = (HALF_M.value, TILE_N.value // 2)
    kind = activation.shards, activation.interleaved
    low, high, desc_rows = weight_views(w1, *kind, (TILE_N.value, tiles.depth))
    steps = tiles.stages, tiles.group
    waits, waiting, world = arrival_arguments(arrivals)
    own = None if arrivals is None else arrivals.rows.own
    bases, pushing = push_arguments(taker)
    _launch_up(
        programs,
        (low, high, matrix_descriptor(act, I, stored)),
        (layer.w1_bias, x, position, expert_ids, sorted_ids, num_post, up_counter, *waits, own),
        (
            *(x.stride(0), R, e, desc_rows, *waiting),
            *activation.numbers,
        ),
        (_case(I, H, *steps, *activation[:3], topk_ids.shape[1], world),),
        num_warps=4,
        maxnreg=168,
    )
    _launch_down(
        programs,
        (
            matrix_descriptor(act, I, (HALF_M.value, tiles.depth)),
            matrix_descriptor(w2, I, (2 * TILE_N.value, tiles.depth)),
            matrix_descriptor(y, H, stored),
        ),
        (layer.w2_bias, expert_ids, sorted_ids, num_post, down_counter, *bases),
        (R, e, *pushing),
        (_case(H, I, *steps),),
        num_warps=4,
        maxnreg=168,
    )
