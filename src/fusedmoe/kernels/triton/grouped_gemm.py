"""Grouped GEMM by indirection, with bias and activation in its epilogue.

Grid (max blocks * cdiv(N, BLOCK_N),), one program per tile of c, in an order that keeps GROUP_M
blocks of slots near each other; the bound comes from shapes, and programs past the blocks in use
leave at once.

a [rows, D], b [e, S * N, D] of any strides; sorted_ids, expert_ids, num_post as in
``kernels/align.py`` with blocks of BLOCK_M; c [R, N] written by slot. Without a table (sorted_ids
None) every slot is a block by itself, and expert_ids are the routed ids. A step takes one tile of b
(no activation, a plain one, or gate and up interleaved) or two (gate half, up half). Rows are
masked, columns of b wrap around, so nothing outside a tensor is touched.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.triton.activation import gated_activation, plain_activation
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher
from fusedmoe.tuning.tiles import TileConfig


@triton.jit
def tile_at(position, num_m, num_n, GROUP_M: tl.constexpr):
    """(block of slots, tile of columns), blocks fastest inside a group of GROUP_M."""
    per_group = GROUP_M * num_n
    first_m = position // per_group * GROUP_M
    size = tl.minimum(num_m - first_m, GROUP_M)
    within = position % per_group
    return first_m + within % size, within // size


@triton.jit
def tile_of(num_m, N, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """``tile_at`` this program's number."""
    return tile_at(tl.program_id(0), num_m, tl.cdiv(N, BLOCK_N), GROUP_M)


@triton.jit
def block_of(tile_m, sorted_ptr, experts_ptr, map_ptr, num_mapped, R, e, BLOCK_M: tl.constexpr):
    """(expert, slots [BLOCK_M], which of them are real) of one block; expert -1: skip it."""
    expert = local_expert(tl.load(experts_ptr + tile_m), map_ptr, num_mapped, e)
    row = tl.arange(0, BLOCK_M)
    if sorted_ptr is None:
        slots = tile_m + row
        row_ok = row == 0
    else:
        slots = tl.load(sorted_ptr + tile_m * BLOCK_M + row)
        row_ok = (slots >= 0) & (slots < R)
    return expert.to(tl.int64), slots.to(tl.int64), row_ok


@triton.jit
def store_rows(rows, c_ptr, slots, row_ok, tile_n, N, stride_cm, stride_cn, BLOCK_N: tl.constexpr):
    """c[slot, BLOCK_N columns of a tile] = rows, of the slots that are real."""
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ptrs = c_ptr + slots[:, None] * stride_cm + column[None, :].to(tl.int64) * stride_cn
    tl.store(c_ptrs, rows.to(c_ptr.dtype.element_ty), row_ok[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["R"])
def grouped_gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
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
    stride_am,
    stride_ad,
    stride_be,
    stride_bn,
    stride_bd,
    stride_cm,
    stride_cn,
    stride_bias_e,
    stride_bias_n,
    limit,
    alpha,
    beta,
    up_offset,
    TOP_K: tl.constexpr,
    FORMULA: tl.constexpr,
    GATE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """N counts columns of b. GATE "halves": N gate rows, then N up rows, ``up_offset`` elements
    later; "interleaved": they alternate, and c has N / 2 columns; "": there is one kind."""
    num_m = R if sorted_ptr is None else tl.load(num_post_ptr) // BLOCK_M
    if tl.program_id(0) >= num_m * tl.cdiv(N, BLOCK_N):
        return
    tile_m, tile_n = tile_of(num_m, N, BLOCK_N, GROUP_M)
    expert, slots, row_ok = block_of(
        tile_m, sorted_ptr, experts_ptr, map_ptr, num_mapped, R, e, BLOCK_M
    )
    if expert < 0:
        return
    column = ((tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (slots // TOP_K)[:, None] * stride_am + depth[None, :] * stride_ad
    b_ptrs = b_ptr + expert * stride_be + column[None, :] * stride_bn + depth[:, None] * stride_bd
    up_ptrs = b_ptrs + up_offset

    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, D, BLOCK_K):
        if EVEN_D:
            a = tl.load(a_ptrs, row_ok[:, None], 0.0)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, row_ok[:, None] & (depth < D - first)[None, :], 0.0)
            b = tl.load(b_ptrs, (depth < D - first)[:, None], 0.0)
        if GATE == "halves":
            if EVEN_D:
                b_up = tl.load(up_ptrs)
            else:
                b_up = tl.load(up_ptrs, (depth < D - first)[:, None], 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if GATE == "halves":
            up = tl.dot(a, b_up, up, input_precision=PRECISION)
            up_ptrs += BLOCK_K * stride_bd
        a_ptrs += BLOCK_K * stride_ad
        b_ptrs += BLOCK_K * stride_bd

    if bias_ptr is not None:
        bias_ptr += expert * stride_bias_e
        total += tl.load(bias_ptr + column * stride_bias_n).to(tl.float32)[None, :]
        if GATE == "halves":
            up += tl.load(bias_ptr + (column + N) * stride_bias_n).to(tl.float32)[None, :]
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATE == "interleaved" else BLOCK_N
    columns = N // 2 if GATE == "interleaved" else N
    if GATE == "interleaved":
        total, up = tl.split(tl.reshape(total, (BLOCK_M, WIDTH, 2)))
    if GATE != "":
        total = gated_activation(FORMULA, total, up, limit, alpha, beta)
    elif FORMULA is not None:
        total = plain_activation(FORMULA, total)
    store_rows(total, c_ptr, slots, row_ok, tile_n, columns, stride_cm, stride_cn, WIDTH)


_launch = Launcher(grouped_gemm_kernel)


def block_tables(
    blocks: MoEAlignment | LoneSlots, R: int, size: int
) -> tuple[int, tuple[torch.Tensor | None, ...], int]:
    """How many blocks of so many slots there are at most, the tables as the kernels take them,
    mapped ids."""
    if isinstance(blocks, LoneSlots):
        expert_map = blocks.expert_map
        mapped = 0 if expert_map is None else expert_map.shape[0]
        return R, (None, blocks.topk_ids, None, expert_map), mapped
    return blocks.sorted_ids.shape[0] // size, (*blocks, None), 0


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tiles: TileConfig,
    top_k: int,
    bias: torch.Tensor | None,
    act: DeviceActivation,
) -> None:
    """As ``grouped_gemm``, unchecked. Tile widths count columns of c."""
    R, N = c.shape
    D = a.shape[1]
    num_blocks, tables, mapped = block_tables(blocks, R, tiles.block_m)
    if R == 0 or N == 0 or num_blocks == 0:
        return
    gate = "interleaved" if act.interleaved else "halves" if act.gated else ""
    width = 2 if act.interleaved else 1
    _launch(
        (num_blocks * -(-N // tiles.block_n), 1),
        (a, b, c, bias, *tables),
        (
            mapped,
            R,
            b.shape[0],
            N * width,
            D,
            *a.stride(),
            *b.stride(),
            *c.stride(),
            *((0, 0) if bias is None else bias.stride()),
            *act.numbers,
            N * b.stride(1) if gate == "halves" else 0,
        ),
        (
            top_k,
            act.formula or None,
            gate,
            D % tiles.block_k == 0,
            "ieee" if a.dtype == torch.float32 else "tf32",
            tiles.block_m,
            tiles.block_n * width,
            tiles.block_k,
            tiles.group_m,
        ),
        tiles.num_warps,
        tiles.num_stages,
    )
