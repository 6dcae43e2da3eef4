"""Logits of the router's linear layer for few tokens: whole rows of the weight at once.

gate_rows_kernel     grid (E or cdiv(E, 2),): one program computes the logits of one expert, or of
                     two, for all T <= BLOCK_T tokens. The weight, which is nearly all the bytes,
                     is read once.

x [T, H], weight [E, H] of any float dtype and strides, bias [E] or None -> out [T, E] contiguous.
Sums are fp32 and rounded once. Rows from T on are neither read nor written.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2


@triton.jit
def _store_logits(total, bias_ptr, out_ptr, expert, T, E, BLOCK_T: tl.constexpr):
    """Store the logits of one expert, if it exists, from products [BLOCK_T, BLOCK_H]."""
    logits = tl.sum(total, axis=1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)
    row = tl.arange(0, BLOCK_T).to(tl.int64)
    tl.store(out_ptr + row * E + expert, logits, mask=(row < T) & (expert < E))


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
    PAIR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    expert = tl.program_id(0).to(tl.int64) * (2 if PAIR else 1)
    token = tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_H).to(tl.int64)[None, :]
    x_ptr += token * stride_xt + column * stride_xh
    weight_ptr += expert * stride_we + column * stride_wh
    total = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    total_next = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for first in range(0, H, BLOCK_H):
        inside = first + column < H
        weight = tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32)
        if PAIR:
            weight_next = tl.load(weight_ptr + stride_we, mask=inside & (expert + 1 < E), other=0.0)
        x = tl.load(x_ptr, mask=inside & (token < T), other=0.0).to(tl.float32)
        total += x * weight
        if PAIR:
            total_next += x * weight_next.to(tl.float32)
        x_ptr += BLOCK_H * stride_xh
        weight_ptr += BLOCK_H * stride_wh
    _store_logits(total, bias_ptr, out_ptr, expert, T, E, BLOCK_T)
    if PAIR:
        _store_logits(total_next, bias_ptr, out_ptr, expert + 1, T, E, BLOCK_T)


_launch_rows = Launcher(gate_rows_kernel, chained=True)


class RowsTile(NamedTuple):
    """``pair``: a program has two experts, which share the reads of x."""

    pair: bool
    block_t: int
    block_h: int
    warps: int


def gate_rows_tile(num_tokens: int, E: int, H: int, itemsize: int) -> RowsTile:
    """Whole rows at once while the products fit the registers.

    Pairs where so many fp32 rows are read that x, read once a program, weighs as much as the
    weight, and where half as many programs still fill the device.
    """
    block_t = power_of_2(num_tokens)
    pair = itemsize == 4 and block_t > 1 and E >= 256
    products = 8192 if itemsize == 4 and not pair else 16384
    block_h = min(power_of_2(H), products // block_t, 8192 if block_t == 1 else 4096)
    if block_t * block_h < 2048:
        return RowsTile(pair, block_t, block_h, 4)
    unpaired_fp32 = itemsize == 4 and not pair and block_t > 1
    return RowsTile(pair, block_t, block_h, 16 if unpaired_fp32 and block_h == 4096 else 8)


def gate_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    (T, H), E = x.shape, weight.shape[0]
    out = torch.empty((T, E), dtype=out_dtype, device=x.device)
    if T == 0 or E == 0:
        return out
    tile = gate_rows_tile(T, E, H, weight.element_size())
    _launch_rows(
        (-(-E // 2) if tile.pair else E, 1),
        (x, weight, None if bias is None else bias.contiguous(), out),
        (T, H, E, *x.stride(), *weight.stride()),
        tile[:3],
        tile.warps,
    )
    return out
