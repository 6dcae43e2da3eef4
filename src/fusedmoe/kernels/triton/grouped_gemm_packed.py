"""Grouped GEMM of floating-point rows and weights whose numbers lie in more than nibbles or bytes.

Grid, order, tables and slots as in ``grouped_gemm_quantized``: ROWS weight rows of one expert by
the SLOTS slots of one block. a [rows, D], columns dense; w in the canonical layout of
``QuantizedTensor``; c [R, N] written by slot.

ELEMENT says how DEPTH columns of a row are read (``packed_products``), always in tiles (columns
that one product takes together, in any order; with A_ORDERED rows lie tile by tile):

    q2_k to q6_k       one superblock of 256 columns (``threes`` for the first two, ``superblocks``
                       for the next two, ``sixes``), scales within
    q4_1, q5_1         blocks of 32 columns in five or six words, d and m within
                       (``minimum_blocks``)
    e3m2, e2m3         units of sixteen columns in three words (``sextets``), e8m0 scales
    int4, int8         act-order: the group of a column comes from a table [e, S, D], so each number
                       fetches its own scale; groups out of range count as the last one

Numbers are multiplied by their scales and rounded once, to the dtype of a; with SUMS (q2_k, q4_k,
q5_k), and always of q3_k, integers meet the rows, and scales sums.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct, row_addresses
from fusedmoe.kernels.triton.grouped_gemm import block_of, tile_of
from fusedmoe.kernels.triton.launch import Launcher, follow_previous
from fusedmoe.kernels.triton.minimum_blocks import add_minimum_blocks
from fusedmoe.kernels.triton.packed_products import add_ordered, add_sextets
from fusedmoe.kernels.triton.quantized_common import finished, store_features, tile_rows
from fusedmoe.kernels.triton.quantized_launch import launch_product, precision_of
from fusedmoe.kernels.triton.superblock_products import (
    add_sixes,
    add_superblocks,
    add_threes,
    sum_groups,
)


@triton.jit(do_not_specialize=["R"])
def packed_gemm_kernel(
    a_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    index_ptr,
    c_ptr,
    places_ptr,
    bias_ptr,
    sorted_ptr,
    experts_ptr,
    num_post_ptr,
    map_ptr,
    num_mapped,
    R,
    e,
    N,
    D,
    groups,
    stride_am,
    stride_we,
    stride_wn,
    shard_step,
    row_step,
    stride_cm,
    stride_bias_e,
    stride_bias_n,
    limit,
    alpha,
    beta,
    TOP_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    SUMS: tl.constexpr,
    NATIVE: tl.constexpr,
    A_ORDERED: tl.constexpr,
    C_ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """N counts features of c. Feature j of shard s is weight row s * shard_step + j * row_step;
    every weight row has ``groups`` scales, e has S * N rows, all dense."""
    follow_previous(CHAINED)
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
    SHARDS: tl.constexpr = 2 if GATED else 1
    num_m = R if sorted_ptr is None else tl.load(num_post_ptr) // SLOTS
    if tl.program_id(0) >= num_m * tl.cdiv(N, WIDTH):
        return
    tile_m, tile = tile_of(num_m, N, WIDTH, GROUP_M)
    expert, slots, live = block_of(
        tile_m, sorted_ptr, experts_ptr, map_ptr, num_mapped, R, e, SLOTS
    )
    if expert < 0:
        return
    shard, feature = tile_rows(tile, N, ROWS, GATED)
    row = shard * shard_step + feature * row_step
    w_rows = w_ptr + expert * stride_we + row.to(tl.int64) * stride_wn
    a_row = a_ptr + (slots // TOP_K * stride_am)[:, None]
    scales_at = (expert * N * SHARDS + row) * groups

    total = tl.zeros([ROWS, SLOTS], dtype=tl.float32)
    if SUMS and ELEMENT != "q2_k":
        total = sum_groups(total, w_rows, a_row, live, D, ELEMENT, PRECISION, NATIVE)
    else:
        for first in range(0, D, DEPTH):
            if ELEMENT == "q6_k":
                total = add_sixes(total, w_rows, a_row, live, first, A_ORDERED, PRECISION, NATIVE)
            elif ELEMENT == "q2_k" or ELEMENT == "q3_k":
                total = add_threes(
                    total, w_rows, a_row, live, first, ELEMENT, SUMS, A_ORDERED, PRECISION, NATIVE
                )
            elif ELEMENT == "q4_k" or ELEMENT == "q5_k":
                total = add_superblocks(
                    total, w_rows, a_row, live, first, ELEMENT, PRECISION, NATIVE
                )
            elif ELEMENT == "q4_1" or ELEMENT == "q5_1":
                total = add_minimum_blocks(
                    total, w_rows, a_row, live, first, D, A_ORDERED, ELEMENT, PRECISION, NATIVE,
                    DEPTH,
                )  # fmt: skip
            elif ELEMENT == "e3m2" or ELEMENT == "e2m3":
                total = add_sextets(
                    total, w_rows, scale_ptr + scales_at, a_row, live, first, D, A_ORDERED, ELEMENT,
                    PRECISION, NATIVE, DEPTH,
                )  # fmt: skip
            else:
                zero_rows = None if zero_ptr is None else zero_ptr + scales_at
                total = add_ordered(
                    total, w_rows, scale_ptr + scales_at, zero_rows,
                    index_ptr + expert * SHARDS * D, a_row, live, shard, first, groups, D, ELEMENT,
                    GATED, PRECISION, DEPTH,
                )  # fmt: skip

    if ELEMENT == "e3m2" and NATIVE:
        total *= 2.0**61
    elif ELEMENT == "e2m3" and NATIVE:
        total *= 2.0**63
    value = finished(
        total, bias_ptr, expert, row, stride_bias_e, stride_bias_n, limit, alpha, beta, FORMULA,
        GATED,
    )  # fmt: skip
    if places_ptr is not None:
        places_ptr += expert * N
    store_features(value, c_ptr, places_ptr, slots, live, tile, N, stride_cm, C_ORDER)


_launch = Launcher(packed_gemm_kernel, chained=True)
# Superblocks with minima, whose scales meet sums while slots are so few that this takes less.
_MINIMA, MOST_SUMS = ("q2_k", "q4_k", "q5_k"), 32


def launch(
    product: QuantizedProduct,
    a_ordered: bool,
    c_order: str,
    c_places: torch.Tensor | None,
    native: bool,
) -> None:
    """As ``quantized_gemm``, unchecked. ``native``: the GPU has packed bf16 arithmetic and a is
    bf16."""
    a, w, c, _, tile, *_ = product
    element, scale = w.format.element, w.scale
    groups = 0 if scale is None else scale.shape[2]
    sums = element in _MINIMA and a.shape[1] > 0 and tile.slots <= MOST_SUMS
    launch_product(
        _launch,
        product,
        (a, w.data, scale, w.zero_point, w.group_index, c, c_places),
        (groups, a.stride(0), *row_addresses(w), c.stride(0)),
        (element, sums, native, a_ordered, c_order, precision_of(a)),
    )
