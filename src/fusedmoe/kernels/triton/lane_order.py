"""Columns in the order in which the lanes of a product hold nibbles.

Grid (cdiv(T * H / 32, UNITS),): x [T, H], rows dense -> out [T, H], 32 columns by themselves.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import Launcher, follow_previous

_UNITS = 128


@triton.jit
def lane_order_kernel(
    x_ptr,
    out_ptr,
    units,
    stride_x,
    IN_ROW: tl.constexpr,
    UNITS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """IN_ROW units of 32 columns in a row."""
    follow_previous(CHAINED)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    column = tl.arange(0, 32)
    there = (unit < units)[:, None]
    from_unit = (unit // IN_ROW).to(tl.int64) * stride_x + unit % IN_ROW * 32
    words = tl.load(x_ptr + from_unit[:, None] + column[None, :], there)
    words = tl.permute(tl.reshape(words, [UNITS, 4, 2, 4]), [0, 3, 1, 2])
    to_unit = out_ptr + unit.to(tl.int64)[:, None] * 32
    tl.store(to_unit + column[None, :], tl.reshape(words, [UNITS, 32]), there)


_launch = Launcher(lane_order_kernel, chained=True)


def launch(x: torch.Tensor, out: torch.Tensor) -> None:
    """As ``lane_order``, unchecked."""
    T, H = x.shape
    units = T * H // 32
    if units:
        grid = -(-units // _UNITS), 1
        _launch(grid, (x, out), (units, x.stride(0)), (H // 32, _UNITS), 4)
