"""Grouped GEMM of e4m3 rows and int4 weights, which become e4m3 in registers: exactly.

Grid, tables and tiles as in ``grouped_gemm_quantized``: ROWS weight rows by SLOTS slots, DEPTH
columns per step. a [rows, D] e4m3 with a_scale [rows, 1] or [1]; w [e, S * N, D / 2], scale and
zero point in the canonical layout; c [R, N] written by slot.

Columns of even number make one product and those of odd number another. A step's products are
summed by themselves, times the scale of its group, and added to the total in fp32, which is also
what keeps fp8 sums exact. An integer from -15 to 15 is an e4m3 number.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct, row_addresses
from fusedmoe.kernels.triton.grouped_gemm import block_of, tile_of
from fusedmoe.kernels.triton.launch import Launcher, follow_previous
from fusedmoe.kernels.triton.quantized_common import finished, store_features, tile_rows
from fusedmoe.kernels.triton.quantized_launch import launch_product


def _nibbles_asm() -> str:
    """Four bytes of nibbles n -> e4m3 bytes of n - 8: of the low nibbles, then of the high ones.

    A permutation of bytes picks four out of eight at a time.
    """
    codes = torch.arange(-8.0, 8.0, device="cpu").to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    a, b, c, d = (sum(codes[i + j] << (8 * j) for j in range(4)) for i in (0, 4, 8, 12))
    lines = [
        "{ .reg .b32 s, m, x, y, p, q;",
        "and.b32 s, $2, 0x77777777;",
        "shr.u32 m, $2, 1;",
        "lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;",
    ]
    for half in "pq":
        if half == "q":
            lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;"]
        lines += [
            f"mov.b32 x, {a:#010x};",
            f"mov.b32 y, {c:#010x};",
            f"prmt.b32 x, x, {b:#010x}, s;",
            f"prmt.b32 y, y, {d:#010x}, s;",
            f"prmt.b32 {half}, x, y, m;",
        ]
    lines += ["prmt.b32 $0, p, q, 0x6420;", "prmt.b32 $1, p, q, 0x7531;", "}"]
    return "\n".join(lines)


_NIBBLES_ASM = tl.constexpr(_nibbles_asm())


@triton.jit
def _numbers(packed, zero, NATIVE: tl.constexpr):
    """Low and high nibbles less ``zero`` (fp32 [ROWS], None: 8), in e4m3."""
    if NATIVE and zero is None:
        low, high = tl.inline_asm_elementwise(
            _NIBBLES_ASM,
            "=r,=r,r",
            [packed],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
        return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
    else:
        middle = 8.0 if zero is None else zero[:, None]
        low, high = (packed & 15).to(tl.float32) - middle, (packed >> 4).to(tl.float32) - middle
        return low.to(tl.float8e4nv), high.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["R"])
def w4a8_gemm_kernel(
    a_ptr,
    w_ptr,
    a_scale_ptr,
    scale_ptr,
    zero_ptr,
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
    groups,
    stride_am,
    stride_as,
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
    GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_D: tl.constexpr,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """N counts features of c. Feature j of shard s is weight row s * shard_step + j * row_step;
    GROUP counts columns that share a scale, a multiple of DEPTH, or 0: all of them."""
    follow_previous(CHAINED)
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
    SHARDS: tl.constexpr = 2 if GATED else 1
    PACKED: tl.constexpr = DEPTH // 2
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
    at, wide = tl.arange(0, PACKED), tl.arange(0, DEPTH)
    w_ptrs = w_ptr + expert * stride_we + row.to(tl.int64)[:, None] * stride_wn + at[None, :]
    a_rows = tl.where(live, slots // TOP_K, 0)
    a_ptrs = a_ptr + (a_rows * stride_am)[:, None] + wide[None, :]
    scales_at = (expert * N * SHARDS + row) * groups

    total = tl.zeros([ROWS, SLOTS], dtype=tl.float32)
    for first in range(0, D, DEPTH):
        group = first // GROUP if GROUP else 0
        scale = tl.load(scale_ptr + scales_at + group).to(tl.float32)
        zero = None
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + scales_at + group).to(tl.float32)
        if EVEN_D:
            packed = tl.load(w_ptrs + first // 2)
            a = tl.load(a_ptrs + first, live[:, None], 0.0)
        else:
            packed = tl.load(w_ptrs + first // 2, (at < (D - first) // 2)[None, :], 0)
            a = tl.load(a_ptrs + first, live[:, None] & (wide < D - first)[None, :], 0.0)
        low, high = _numbers(packed, zero, NATIVE)
        even, odd = tl.split(tl.reshape(a, (SLOTS, PACKED, 2)))
        part = tl.dot(low, tl.trans(even), out_dtype=tl.float32)
        part = tl.dot(high, tl.trans(odd), part, out_dtype=tl.float32)
        total += part * scale[:, None]

    total *= tl.load(a_scale_ptr + a_rows * stride_as)[None, :]
    value = finished(
        total, bias_ptr, expert, row, stride_bias_e, stride_bias_n, limit, alpha, beta, FORMULA,
        GATED,
    )  # fmt: skip
    store_features(value, c_ptr, None, slots, live, tile, N, stride_cm, "")


_launch = Launcher(w4a8_gemm_kernel, chained=True)


def launch(product: QuantizedProduct, a_scale: torch.Tensor, native: bool) -> None:
    """As ``w4a8_gemm``, unchecked. ``native``: not under the interpreter."""
    a, w, c, _, tile, *_ = product
    scale = w.scale
    assert scale is not None
    a_stride = a_scale.stride(0) if a_scale.numel() > 1 else 0
    launch_product(
        _launch,
        product,
        (a, w.data, a_scale, scale, w.zero_point, c),
        (scale.shape[2], a.stride(0), a_stride, *row_addresses(w), c.stride(0)),
        (max(0, w.format.group.col), native, a.shape[1] % tile.depth == 0),
    )
