"""Grouped GEMM by indirection with a fixed number of programs, bounded by counts on the device.

Grid (programs,), any number: program i takes the tiles i, i + programs, ... of those that the table
(or the number of valid tokens) says are there. Tiles that are neighbours in that order share
GROUP_M blocks of slots.

a [rows, D], b [e, S * N, D] of any strides, c [R, N] written by slot. With a table (sorted_ids
[P], expert_ids, num_post as in ``kernels/align.py``) a block is BLOCK_M slots of one expert;
without (sorted_ids None) it is one valid slot of the routing map, expert_ids being that map and
num_post the number of valid tokens. Rows are masked, columns of b wrap around: nothing outside a
tensor is touched, whatever the table holds.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.bounded_align import BoundedRouting
from fusedmoe.kernels.triton.activation import gated_activation, plain_activation
from fusedmoe.kernels.triton.bounded_align import expert_here, valid_slots
from fusedmoe.kernels.triton.grouped_gemm import store_rows, tile_at
from fusedmoe.kernels.triton.launch import Launcher, follow_previous
from fusedmoe.tuning.tiles import TileConfig


@triton.jit(do_not_specialize=["R", "P"])
def bounded_gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    weights_ptr,
    sorted_ptr,
    experts_ptr,
    bound_ptr,
    R,
    P,
    first_expert,
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
    up_offset,
    TOP_K: tl.constexpr,
    PICKS: tl.constexpr,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """N counts columns of c; where GATED, b has N gate rows, then N up rows, ``up_offset`` later.
    R counts slots, P entries of the table."""
    follow_previous(CHAINED)
    if sorted_ptr is None:
        num_m = valid_slots(bound_ptr, PICKS, R)
    else:
        num_m = tl.minimum(tl.load(bound_ptr), P) // BLOCK_M
    num_n = tl.cdiv(N, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    for position in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(position, num_m, num_n, GROUP_M)
        expert = expert_here(tl.load(experts_ptr + tile_m), first_expert, e).to(tl.int64)
        if sorted_ptr is None:
            slots = (tile_m + row).to(tl.int64)
            row_ok = (row == 0) & (expert >= 0)
        else:
            slots = tl.load(sorted_ptr + tile_m * BLOCK_M + row).to(tl.int64)
            row_ok = (slots >= 0) & (slots < R) & (expert >= 0)
        column = ((tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
        a_ptrs = a_ptr + (slots // TOP_K)[:, None] * stride_am + depth[None, :] * stride_ad
        b_ptrs = (
            b_ptr + expert * stride_be + column[None, :] * stride_bn + depth[:, None] * stride_bd
        )

        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        # A block without an expert here has no depth: it reads nothing.
        for start in range(0, tl.where(expert >= 0, D, 0), BLOCK_K):
            if EVEN_D:
                a = tl.load(a_ptrs, row_ok[:, None], 0.0)
                b = tl.load(b_ptrs)
            else:
                a = tl.load(a_ptrs, row_ok[:, None] & (depth < D - start)[None, :], 0.0)
                b = tl.load(b_ptrs, (depth < D - start)[:, None], 0.0)
            if GATED:
                if EVEN_D:
                    b_up = tl.load(b_ptrs + up_offset)
                else:
                    b_up = tl.load(b_ptrs + up_offset, (depth < D - start)[:, None], 0.0)
                up = tl.dot(a, b_up, up, input_precision=PRECISION)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            a_ptrs += BLOCK_K * stride_ad
            b_ptrs += BLOCK_K * stride_bd

        if GATED:
            total = gated_activation(FORMULA, total, up, None, 1.0, 0.0)
        elif FORMULA is not None:
            total = plain_activation(FORMULA, total)
        if weights_ptr is not None:
            total *= tl.load(weights_ptr + slots, row_ok, 0.0).to(tl.float32)[:, None]
        store_rows(total, c_ptr, slots, row_ok, tile_n, N, stride_cm, stride_cn, BLOCK_N)


_launch = Launcher(bounded_gemm_kernel, chained=True)


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    blocks: MoEAlignment | BoundedRouting,
    tiles: TileConfig,
    top_k: int,
    programs: int,
    row_weights: torch.Tensor | None,
    activation: MoEActivation | None,
) -> torch.Tensor:
    """As ``bounded_gemm``, unchecked."""
    (R, N), D, e = c.shape, a.shape[1], b.shape[0]
    if R == 0 or N == 0:
        return c
    tables: tuple[torch.Tensor | None, ...]
    if isinstance(blocks, MoEAlignment):
        tables, P, first_expert, picks = blocks, blocks.sorted_ids.shape[0], 0, 1
    else:
        tables = (None, blocks.routing_map, blocks.num_valid)
        P, first_expert, picks = 0, blocks.first_expert, blocks.routing_map.shape[1]
    act = device_activation(activation)
    _launch(
        (programs, 1),
        (a, b, c, row_weights, *tables),
        (
            R,
            P,
            first_expert,
            e,
            N,
            D,
            *a.stride(),
            *b.stride(),
            *c.stride(),
            N * b.stride(1),
        ),
        (
            top_k,
            picks,
            act.formula or None,
            act.gated,
            D % tiles.block_k == 0,
            "ieee" if a.dtype == torch.float32 else "tf32",
            tiles.block_m,
            tiles.block_n,
            tiles.block_k,
            tiles.group_m,
        ),
        tiles.num_warps,
        tiles.num_stages,
    )
    return c
