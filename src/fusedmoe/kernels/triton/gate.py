"""Logits of the router's linear layer, two ways.

gate_rows_kernel, grid E: one program computes one expert's logits of all T <= BLOCK_T tokens. The
weight, which is nearly all the bytes, is read once, by as many programs as there are experts.

gate_tiles_kernel, grid (cdiv(T, BLOCK_T), cdiv(E, BLOCK_E)): a matrix product whose tile and
order of summation depend on no size, so that a row's bits do not depend on its batch.

x [T, H], weight [E, H] of any float dtype and strides, bias [E] or None -> out [T, E] contiguous.
Sums are fp32 and rounded once. Rows from T on are neither read nor written.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import Launcher, power_of_2

TILE_T, TILE_E, TILE_H = 32, 32, 128


@triton.jit(do_not_specialize=["T"])
def gate_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    T,
    H,
    E,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wh,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_H).to(tl.int64)[None, :]
    x_ptr += token * stride_xt + column * stride_xh
    weight_ptr += expert * stride_we + column * stride_wh
    total = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for first in range(0, H, BLOCK_H):
        inside = first + column < H
        weight = tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr, mask=inside & (token < T), other=0.0).to(tl.float32)
        total += x * weight
        x_ptr += BLOCK_H * stride_xh
        weight_ptr += BLOCK_H * stride_wh
    logits = tl.sum(total, axis=1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + expert).to(tl.float32)
    row = tl.arange(0, BLOCK_T).to(tl.int64)
    tl.store(out_ptr + row * E + expert, logits, mask=row < T)


@triton.jit(do_not_specialize=["T"])
def gate_tiles_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    T,
    H,
    E,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wh,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_H).to(tl.int64)
    x_ptr += token[:, None] * stride_xt + column[None, :] * stride_xh
    weight_ptr += column[:, None] * stride_wh + expert[None, :] * stride_we
    total = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for first in range(0, H, BLOCK_H):
        inside = first + column < H
        x = tl.load(x_ptr, mask=(token < T)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptr, mask=inside[:, None] & (expert < E)[None, :], other=0.0)
        if WIDEN:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_ptr += BLOCK_H * stride_xh
        weight_ptr += BLOCK_H * stride_wh
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert, mask=expert < E, other=0.0)
        total += bias.to(tl.float32)[None, :]
    out = out_ptr + token[:, None] * E + expert[None, :]
    tl.store(out, total, mask=(token < T)[:, None] & (expert < E)[None, :])


_launch_rows = Launcher(gate_rows_kernel)
_launch_tiles = Launcher(gate_tiles_kernel)


def gate_rows_tile(num_tokens: int, hidden: int) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_H, warps): whole rows at once while the products fit the registers."""
    block_t = power_of_2(num_tokens)
    block_h = min(power_of_2(hidden), max(16384 // block_t, 64), 4096)
    return block_t, block_h, 8 if block_t * block_h >= 8192 else 4


def gate_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    (T, H), E = x.shape, weight.shape[0]
    out = torch.empty((T, E), dtype=out_dtype, device=x.device)
    if T == 0 or E == 0:
        return out
    block_t, block_h, num_warps = gate_rows_tile(T, H)
    _launch_rows(
        (E, 1),
        (x, weight, None if bias is None else bias.contiguous(), out),
        (T, H, E, *x.stride(), *weight.stride()),
        (block_t, block_h),
        num_warps,
    )
    return out


def gate_tiles(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    (T, H), E = x.shape, weight.shape[0]
    out = torch.empty((T, E), dtype=out_dtype, device=x.device)
    if T == 0 or E == 0:
        return out
    widen = x.dtype is not weight.dtype or x.dtype is torch.float32
    _launch_tiles(
        (-(-T // TILE_T), -(-E // TILE_E)),
        (x, weight, None if bias is None else bias.contiguous(), out),
        (T, H, E, *x.stride(), *weight.stride()),
        (widen, TILE_T, TILE_E, TILE_H),
        4,
    )
    return out
