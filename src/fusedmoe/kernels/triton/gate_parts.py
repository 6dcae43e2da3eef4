"""Logits of the router's linear layer, as tiles of tokens and experts over parts of H.

gate_parts_kernel    grid (tiles of tokens x tiles of experts, PARTS): one program sums one tile
                     over a part of H, so that few tokens and experts keep the device busy.
gate_sum_kernel      grid (cdiv(T * E, BLOCK),): adds the parts, in order, and the bias.
gate_chained_kernel  grid (tiles of tokens x tiles of experts, 1): the parts one after the other, by
                     the same operations in the same order as the two kernels above: the same bits.

x [T, H], weight [E, H] of any float dtype and strides, bias [E] or None -> out [T, E] contiguous;
parts fp32 [PARTS, T, E]. Sums are fp32 and rounded once. Rows from T on are neither read nor
written. Weights are the M side of the products, 32 rows of it at most: a token's logits then come
from the same instructions however many tokens are its neighbours.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.gate import GateTile
from fusedmoe.kernels.triton.launch import Launcher, follow_previous

# More tokens than this make enough tiles without cutting H.
PARTS_TOKENS = 64
CHAINED_TOKENS_PER_TILE = 64
SUM_BLOCK = 128


@triton.jit
def _tf32_halves(x):
    """fp32 as a sum of two numbers that lose next to nothing as tf32 (an infinity becomes NaN)."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _step(
    weight_ptr,
    x_ptr,
    weight_mask,
    x_mask,
    total,
    low_weight,
    low_x,
    WIDEN: tl.constexpr,
):
    """Add one step's products; fp32 as three tf32 products, each with a sum of its own."""
    weight = tl.load(weight_ptr, mask=weight_mask, other=0.0)
    x = tl.load(x_ptr, mask=x_mask, other=0.0)
    if WIDEN:
        high_w, small_w = _tf32_halves(weight.to(tl.float32))
        high_x, small_x = _tf32_halves(x.to(tl.float32))
        total = tl.dot(high_w, high_x, total, input_precision="tf32")
        low_weight = tl.dot(small_w, high_x, low_weight, input_precision="tf32")
        low_x = tl.dot(high_w, small_x, low_x, input_precision="tf32")
    else:
        total = tl.dot(weight, x, total)
    return total, low_weight, low_x


@triton.jit
def _part(
    x_ptr,
    weight_ptr,
    token,
    expert,
    part,
    T,
    H,
    E,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wh,
    STEPS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[experts, tokens]: the sum over the columns of one part, two slabs of STEPS * BLOCK_H.

    Slabs and halves have sums of their own: a product waits for the one before it, and here six
    are under way.
    """
    SLAB: tl.constexpr = STEPS * BLOCK_H
    column = part * (2 * SLAB) + tl.arange(0, BLOCK_H).to(tl.int64)
    x_ptr += column[:, None] * stride_xh + token[None, :] * stride_xt
    weight_ptr += expert[:, None] * stride_we + column[None, :] * stride_wh
    zero = tl.zeros([expert.shape[0], token.shape[0]], dtype=tl.float32)
    a, low_wa, low_xa, b, low_wb, low_xb = zero, zero, zero, zero, zero, zero
    known_e, known_t = (expert < E)[:, None], (token < T)[None, :]
    for step in range(STEPS):
        inside = column + step * BLOCK_H < H
        a, low_wa, low_xa = _step(
            weight_ptr, x_ptr, known_e & inside[None, :], known_t & inside[:, None],
            a, low_wa, low_xa, WIDEN,
        )  # fmt: skip
        inside = column + (SLAB + step * BLOCK_H) < H
        b, low_wb, low_xb = _step(
            weight_ptr + SLAB * stride_wh, x_ptr + SLAB * stride_xh,
            known_e & inside[None, :], known_t & inside[:, None], b, low_wb, low_xb, WIDEN,
        )  # fmt: skip
        x_ptr += BLOCK_H * stride_xh
        weight_ptr += BLOCK_H * stride_wh
    if WIDEN:
        a += low_wa + low_xa
        b += low_wb + low_xb
    return a + b


@triton.jit
def _tile(E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Tokens and experts of this program."""
    tile, tiles_e = tl.program_id(0), tl.cdiv(E, BLOCK_E)
    token = (tile // tiles_e).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = (tile % tiles_e).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    return token, expert


@triton.jit(do_not_specialize=["T"])
def gate_parts_kernel(
    x_ptr,
    weight_ptr,
    parts_ptr,
    T,
    H,
    E,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wh,
    STEPS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    token, expert = _tile(E, BLOCK_T, BLOCK_E)
    part = tl.program_id(1).to(tl.int64)
    total = _part(
        x_ptr, weight_ptr, token, expert, part, T, H, E, stride_xt, stride_xh, stride_we, stride_wh,
        STEPS, WIDEN, BLOCK_H,
    )  # fmt: skip
    at = parts_ptr + (part * T + token)[None, :] * E + expert[:, None]
    tl.store(at, total, mask=(token < T)[None, :] & (expert < E)[:, None])


@triton.jit(do_not_specialize=["T"])
def gate_sum_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    T,
    E,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = T.to(tl.int64) * E
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * size + at, mask=at < size, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % E, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total, mask=at < size)


@triton.jit(do_not_specialize=["T"])
def gate_chained_kernel(
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
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token, expert = _tile(E, BLOCK_T, BLOCK_E)
    total = tl.zeros([BLOCK_E, BLOCK_T], dtype=tl.float32)
    for part in range(PARTS):
        total += _part(
            x_ptr, weight_ptr, token, expert, part, T, H, E, stride_xt, stride_xh, stride_we,
            stride_wh, STEPS, WIDEN, BLOCK_H,
        )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert, mask=expert < E, other=0.0)
        total += bias.to(tl.float32)[:, None]
    out = out_ptr + token[None, :] * E + expert[:, None]
    tl.store(out, total, mask=(token < T)[None, :] & (expert < E)[:, None])


_launch_parts = Launcher(gate_parts_kernel, chained=True)
_launch_sum = Launcher(gate_sum_kernel, chained=True)
_launch_chained = Launcher(gate_chained_kernel)


def gate_parts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: GateTile,
) -> torch.Tensor:
    """Logits whose bits depend on ``tile`` and the row alone, not on the number of rows."""
    (T, H), E = x.shape, weight.shape[0]
    out = torch.empty((T, E), dtype=out_dtype, device=x.device)
    if T == 0 or E == 0:
        return out
    widen = x.dtype is not weight.dtype or x.dtype is torch.float32
    bias = None if bias is None else bias.contiguous()
    sizes = (T, H, E, *x.stride(), *weight.stride())
    tiles_e = -(-E // tile.experts)
    if T > PARTS_TOKENS:
        tokens = CHAINED_TOKENS_PER_TILE
        _launch_chained(
            (-(-T // tokens) * tiles_e, 1),
            (x, weight, bias, out),
            sizes,
            (tile.parts, tile.steps, widen, tokens, tile.experts, tile.columns),
            4,
        )
        return out
    tokens = 8 if T <= 8 else 16
    parts = torch.empty((tile.parts, T, E), dtype=torch.float32, device=x.device)
    _launch_parts(
        (-(-T // tokens) * tiles_e, tile.parts),
        (x, weight, parts),
        sizes,
        (tile.steps, widen, tokens, tile.experts, tile.columns),
        tile.warps,
        tile.steps + 1,
    )
    _launch_sum((-(-T * E // SUM_BLOCK), 1), (parts, bias, out), (T, E), (tile.parts, SUM_BLOCK), 4)
    return out
