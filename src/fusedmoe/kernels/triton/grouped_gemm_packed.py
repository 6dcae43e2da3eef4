"""Grouped GEMM of floating-point rows and weights whose numbers lie in more than nibbles or bytes.

Grid, order, tables and slots as in ``grouped_gemm_quantized``: ROWS weight rows of one expert by
the SLOTS slots of one block. a [rows, D], columns dense; w in the canonical layout of
``QuantizedTensor``; c [R, N] written by slot.

ELEMENT says how DEPTH columns of a row are read, always in planes (columns that one product takes
together, in any order), each number times its scale, rounded to the dtype of a:

    q4_k, q5_k, q6_k   one superblock of 256 columns (``superblocks``); no scales beside it
    e3m2, e2m3         units of four columns in three bytes (``sextets``), e8m0 scales
    int4, int8         act-order: the group of a column comes from a table [e, S, D], so each number
                       fetches its own scale; groups out of range count as the last one
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.triton.grouped_gemm import block_of, tile_of
from fusedmoe.kernels.triton.grouped_gemm_quantized import NO_ACTIVATION, block_tables
from fusedmoe.kernels.triton.launch import Launcher, follow_previous
from fusedmoe.kernels.triton.quantized_common import (
    activated,
    float_scale,
    half_scale_bits,
    spread_groups,
    store_features,
    tile_rows,
    times_bf16,
)
from fusedmoe.kernels.triton.sextets import (
    four_planes,
    load_bytes,
    sextet_numbers,
    sextets_bf16,
)
from fusedmoe.kernels.triton.superblocks import (
    group_integers,
    one_sixth,
    scales_of_words,
    superblock_columns,
    superblock_numbers,
    superblock_words,
)
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedTile


@triton.jit
def _add_superblocks(
    total, w_rows, a_row, live, first, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """total + the products of the 256 columns from ``first`` on."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    NBYTES: tl.constexpr = 144 if ELEMENT == "q4_k" else 176 if ELEMENT == "q5_k" else 210
    low, high = superblock_numbers(w_rows + first // 256 * NBYTES, ELEMENT, DTYPE, NATIVE)
    low_columns, high_columns = superblock_columns(ELEMENT)
    a = tl.load(a_row + (first + low_columns)[None, :], live[:, None], 0.0)
    total = tl.dot(low, tl.trans(a), total, input_precision=PRECISION)
    a = tl.load(a_row + (first + high_columns)[None, :], live[:, None], 0.0)
    return tl.dot(high, tl.trans(a), total, input_precision=PRECISION)


@triton.jit
def _sum_groups(
    total, w_rows, a_row, live, D, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """total + the products of all columns of q4_k or q5_k, group by group: integers meet the rows,
    scales the sums, so that no weight is rounded. Tensor cores sum the rows too, for the minima."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    NBYTES: tl.constexpr = 144 if ELEMENT == "q4_k" else 176
    OFFSET: tl.constexpr = 128.0 if NATIVE else 0.0
    both, bits, more, most = superblock_words(w_rows)
    for first in range(0, D, 256):
        block = w_rows + first // 256 * NBYTES
        d, least, scales, minima = scales_of_words(both, bits, more, most)
        # Behind the last superblock it is read once more, and not used.
        both, bits, more, most = superblock_words(
            w_rows + tl.minimum(first // 256 + 1, D // 256 - 1) * NBYTES
        )
        at = first + tl.arange(0, 32)
        for chunk in tl.static_range(4):
            low, high, ones = group_integers(block, chunk, ELEMENT, DTYPE, NATIVE)
            a = tl.trans(tl.load(a_row + (at + 64 * chunk)[None, :], live[:, None], 0.0))
            b = tl.trans(tl.load(a_row + (at + 64 * chunk + 32)[None, :], live[:, None], 0.0))
            low_sum = tl.dot(low, a, input_precision=PRECISION)
            low_rows = tl.dot(ones, a, input_precision=PRECISION)
            high_sum = tl.dot(high, b, input_precision=PRECISION)
            high_rows = tl.dot(ones, b, input_precision=PRECISION)
            scale = d * one_sixth(scales, 2 * chunk)
            rest = least * one_sixth(minima, 2 * chunk) + OFFSET * scale
            total += low_sum * scale[:, None]
            total -= low_rows * rest[:, None]
            scale = d * one_sixth(scales, 2 * chunk + 1)
            rest = least * one_sixth(minima, 2 * chunk + 1) + OFFSET * scale
            total += high_sum * scale[:, None]
            total -= high_rows * rest[:, None]
    return total


@triton.jit
def _add_sextets(
    total, w_rows, scale_rows, a_row, live, first, D, ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr, NATIVE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total + the products of DEPTH columns; D is a multiple of 32."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    at, groups = tl.arange(0, DEPTH // 4), tl.arange(0, DEPTH // 32)
    inside = (at < (D - first) // 4)[None, :]
    low, middle, high = load_bytes(w_rows[:, None] + (first // 4 * 3 + 3 * at)[None, :], inside)
    there = (groups < (D - first) // 32)[None, :]
    scale = tl.load(scale_rows[:, None] + (first // 32 + groups)[None, :], there, 127)
    if NATIVE:
        # Of what the numbers are short of, half goes with the scales, and half with the sum.
        bits = spread_groups(half_scale_bits(scale), DEPTH // 4)
        factor = bits.to(tl.bfloat16, bitcast=True)
        w0, w1, w2, w3 = sextets_bf16(low, middle, high, ELEMENT)
        w0, w1 = times_bf16(w0, factor), times_bf16(w1, factor)
        w2, w3 = times_bf16(w2, factor), times_bf16(w3, factor)
    else:
        factor = spread_groups(float_scale(scale), DEPTH // 4)
        w0, w1, w2, w3 = sextet_numbers(low, middle, high, factor, ELEMENT, DTYPE)
    wide = tl.arange(0, DEPTH)
    a = tl.load(a_row + (first + wide)[None, :], live[:, None] & (wide < D - first)[None, :], 0.0)
    a0, a1, a2, a3 = four_planes(a)
    total = tl.dot(w0, tl.trans(a0), total, input_precision=PRECISION)
    total = tl.dot(w1, tl.trans(a1), total, input_precision=PRECISION)
    total = tl.dot(w2, tl.trans(a2), total, input_precision=PRECISION)
    return tl.dot(w3, tl.trans(a3), total, input_precision=PRECISION)


@triton.jit
def _by_group(number, column, index_rows, scale_rows, zero_rows, shard, groups, D, inside,
              MIDDLE: tl.constexpr, DTYPE: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Integers [ROWS, W] of the columns [W], less the zero point and times the scale of their
    groups."""
    last = (groups - 1).to(tl.uint32)
    group = tl.load(index_rows + column, inside, 0)
    group = tl.minimum(group.to(tl.uint32, bitcast=True), last)[None, :]
    if GATED:
        other = tl.load(index_rows + D + column, inside, 0)
        other = tl.minimum(other.to(tl.uint32, bitcast=True), last)[None, :]
        group = tl.where((shard == 0)[:, None], group, other)
    number = number.to(tl.float32)
    if zero_rows is None:
        number -= MIDDLE
    else:
        number -= tl.load(zero_rows[:, None] + group).to(tl.float32)
    return (number * tl.load(scale_rows[:, None] + group).to(tl.float32)).to(DTYPE)


@triton.jit
def _add_ordered(
    total, w_rows, scale_rows, zero_rows, index_rows, a_row, live, shard, first, groups, D,
    ELEMENT: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """total + the products of DEPTH columns, each of which names its group."""
    DTYPE: tl.constexpr = a_row.dtype.element_ty
    if ELEMENT == "int4":
        at = tl.arange(0, DEPTH // 2)
        inside = at < (D - first) // 2
        packed = tl.load(w_rows[:, None] + (first // 2 + at)[None, :], inside[None, :], 0)
        low = _by_group(
            (packed & 15), first + 2 * at, index_rows, scale_rows, zero_rows, shard, groups, D,
            inside, 8, DTYPE, GATED,
        )  # fmt: skip
        high = _by_group(
            (packed >> 4), first + 2 * at + 1, index_rows, scale_rows, zero_rows, shard, groups, D,
            inside, 8, DTYPE, GATED,
        )  # fmt: skip
        wide = tl.arange(0, DEPTH)
        mask = live[:, None] & (wide < D - first)[None, :]
        a = tl.load(a_row + (first + wide)[None, :], mask, 0.0)
        even, odd = tl.split(tl.reshape(a, (a.shape[0], DEPTH // 2, 2)))
        total = tl.dot(low, tl.trans(even), total, input_precision=PRECISION)
        return tl.dot(high, tl.trans(odd), total, input_precision=PRECISION)
    else:
        at = tl.arange(0, DEPTH)
        inside = at < D - first
        packed = tl.load(w_rows[:, None] + (first + at)[None, :], inside[None, :], 0)
        value = _by_group(
            packed, first + at, index_rows, scale_rows, zero_rows, shard, groups, D, inside, 0,
            DTYPE, GATED,
        )  # fmt: skip
        a = tl.load(a_row + (first + at)[None, :], live[:, None] & inside[None, :], 0.0)
        return tl.dot(value, tl.trans(a), total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["R"])
def packed_gemm_kernel(
    a_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    index_ptr,
    c_ptr,
    bias_ptr,
    weights_ptr,
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
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
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
    if SUMS:
        total = _sum_groups(total, w_rows, a_row, live, D, ELEMENT, PRECISION, NATIVE)
    for first in range(0, 0 if SUMS else D, DEPTH):
        if ELEMENT == "q4_k" or ELEMENT == "q5_k" or ELEMENT == "q6_k":
            total = _add_superblocks(total, w_rows, a_row, live, first, ELEMENT, PRECISION, NATIVE)
        elif ELEMENT == "e3m2" or ELEMENT == "e2m3":
            total = _add_sextets(
                total, w_rows, scale_ptr + scales_at, a_row, live, first, D, ELEMENT, PRECISION,
                NATIVE, DEPTH,
            )  # fmt: skip
        else:
            zero_rows = None if zero_ptr is None else zero_ptr + scales_at
            total = _add_ordered(
                total, w_rows, scale_ptr + scales_at, zero_rows,
                index_ptr + expert * SHARDS * D, a_row, live, shard, first, groups, D, ELEMENT,
                GATED, PRECISION, DEPTH,
            )  # fmt: skip

    if ELEMENT == "e3m2" and NATIVE:
        total *= 2.0**61
    elif ELEMENT == "e2m3" and NATIVE:
        total *= 2.0**63
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * stride_bias_e + row * stride_bias_n)
        total += bias.to(tl.float32)[:, None]
    value = activated(total, limit, alpha, beta, FORMULA, GATED)
    store_features(value, c_ptr, weights_ptr, slots, live, tile, N, stride_cm, False)


_launch = Launcher(packed_gemm_kernel, chained=True)
# Groups of 32 columns, whose scales meet sums while slots are so few that this takes less.
_FEW_GROUPS, MOST_SUMS = ("q4_k", "q5_k"), 32
_PRECISION = {torch.float32: "ieee"}


def launch(
    a: torch.Tensor,
    w: QuantizedTensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tile: QuantizedTile,
    top_k: int,
    bias: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    activation: DeviceActivation | None,
    native: bool,
) -> None:
    """As ``packed_gemm``, unchecked. ``native``: the GPU has packed bf16 arithmetic and a is
    bf16."""
    (R, N), D = c.shape, a.shape[1]
    num_blocks, tables, mapped = block_tables(blocks, R, tile.slots)
    if R == 0 or N == 0 or num_blocks == 0:
        return
    act = activation or NO_ACTIVATION
    width = tile.rows // 2 if act.gated else tile.rows
    steps = (1, w.shards) if w.interleaved else (w.shape[1] // w.shards, 1)
    scale = w.scale
    _launch(
        (num_blocks * -(-N // width), 1),
        (a, w.data, scale, w.zero_point, w.group_index, c, bias, row_weights, *tables),
        (
            mapped,
            R,
            w.shape[0],
            N,
            D,
            0 if scale is None else scale.shape[2],
            a.stride(0),
            *w.data.stride()[:2],
            *steps,
            c.stride(0),
            *((0, 0) if bias is None else bias.stride()),
            act.limit,
            act.alpha,
            act.beta,
        ),
        (
            top_k,
            w.format.element,
            w.format.element in _FEW_GROUPS and tile.slots <= MOST_SUMS,
            native,
            act.formula or None,
            act.gated,
            _PRECISION.get(a.dtype, "tf32"),
            tile.rows,
            tile.slots,
            tile.depth,
            tile.group,
        ),
        tile.warps,
        tile.stages,
    )
