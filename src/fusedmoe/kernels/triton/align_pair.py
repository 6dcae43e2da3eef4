"""The alignment of few slots and the pairing of their rows in one launch.

Grid (groups + T,): the first programs are ``align_once_kernel``'s, each of the others writes a row
of x [T, D] to paired [T, D], 8 * XR columns at a time in the order of ``PairedOrder``, times 2^EVEN
or 2^ODD. Neither needs anything of the other; without groups there is nothing but rows.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.align import align_once_kernel
from fusedmoe.kernels.triton.align_chunks import COUNTS
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2


@triton.jit
def pair_row(
    x_ptr, paired_ptr, row, D, stride_xm,
    XR: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr, BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    follow_previous(CHAINED)
    row = row.to(tl.int64)
    for first in range(0, D, BLOCK_D):
        to = first + tl.arange(0, BLOCK_D)
        matrix, thread, half = to % (8 * XR) // 8, to % 8 // 2, to % 2
        column = to - to % (8 * XR) + thread * 2 * XR + half * XR + matrix
        values = tl.load(x_ptr + row * stride_xm + column, to < D).to(tl.float32)
        unit = tl.where(matrix % 2 == 0, 2.0**EVEN, 2.0**ODD)
        tl.store(paired_ptr + row * D + to, (values * unit).to(x_ptr.dtype.element_ty), to < D)


@triton.jit(do_not_specialize=COUNTS)
def align_and_pair_kernel(
    x_ptr,
    paired_ptr,
    ids_ptr,
    map_ptr,
    sorted_ptr,
    expert_ids_ptr,
    num_post_ptr,
    R,
    P,
    B,
    groups,
    num_mapped,
    block_size,
    D,
    stride_xm,
    XR: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):
    me = tl.program_id(0)
    if ids_ptr is not None:
        if me < groups:
            align_once_kernel(
                ids_ptr, map_ptr, None, sorted_ptr, expert_ids_ptr, num_post_ptr, None, R, P,
                B, groups, num_mapped, block_size, BLOCK_R, BLOCK_G, CHAINED,
            )  # fmt: skip
        else:
            row = me - groups
            pair_row(x_ptr, paired_ptr, row, D, stride_xm, XR, EVEN, ODD, BLOCK_D, CHAINED)
    else:
        pair_row(x_ptr, paired_ptr, me, D, stride_xm, XR, EVEN, ODD, BLOCK_D, CHAINED)


_launch = Launcher(align_and_pair_kernel, chained=True)


def align_and_pair(
    x: torch.Tensor,
    paired: torch.Tensor,
    order: tuple[int, int, int],
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    groups: int = 0,
    block_size: int = 0,
    out: MoEAlignment | None = None,
) -> None:
    """As ``kernels.align_pair``, with its outputs; without ids nothing is aligned."""
    (T, D), R = x.shape, 0 if topk_ids is None else topk_ids.numel()
    sizes = (0, 0) if out is None else (out.sorted_ids.numel(), out.expert_ids.numel())
    mapped = 0 if expert_map is None else expert_map.shape[0]
    block_r, block_g = min(1024, max(32, power_of_2(max(R, 1)))), power_of_2(max(groups, 1))
    _launch(
        (groups + T, 1),
        (x, paired, topk_ids, expert_map, *(out or (None, None, None))),
        (R, *sizes, groups, mapped, block_size, D, x.stride(0)),
        (*order, block_r, block_g, min(8192, power_of_2(D))),
        4,
    )
