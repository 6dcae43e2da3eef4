"""The alignment of few slots and the rounding of their rows in one launch.

Grid (groups + T,): the first programs are ``align_once_kernel``'s, each of the others rounds a row
of x [T, D] -> q [T, D] with scale [T, groups of columns], or by a given scale [1], and sets largest
[K] of its token, if there is one, to zero. Neither needs anything of the other.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.triton.align import align_once_kernel
from fusedmoe.kernels.triton.align_chunks import COUNTS
from fusedmoe.kernels.triton.launch import Launcher, follow_previous, power_of_2
from fusedmoe.kernels.triton.quantize import round_given, round_groups, round_row


@triton.jit(do_not_specialize=COUNTS)
def align_and_quantize_kernel(
    ids_ptr,
    map_ptr,
    sorted_ptr,
    expert_ids_ptr,
    num_post_ptr,
    x_ptr,
    q_ptr,
    scale_ptr,
    largest_ptr,
    R,
    P,
    B,
    groups,
    num_mapped,
    block_size,
    D,
    x_groups,
    stride_xm,
    stride_xd,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    E8M0: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """GROUP: columns that share a scale, 0: a whole row does, -1: all rows, and it is given."""
    if tl.program_id(0) < groups:
        align_once_kernel(
            ids_ptr, map_ptr, None, sorted_ptr, expert_ids_ptr, num_post_ptr, None, R, P, B,
            groups, num_mapped, block_size, BLOCK_R, BLOCK_G, CHAINED,
        )  # fmt: skip
    else:
        follow_previous(CHAINED)
        row = (tl.program_id(0) - groups).to(tl.int64)
        if largest_ptr is not None:
            for pick in tl.static_range(K):
                tl.store(largest_ptr + row * K + pick, 0)
        if GROUP < 0:
            for first in range(0, D, BLOCK_D):
                round_given(x_ptr, q_ptr, scale_ptr, row, first, D, stride_xm, stride_xd, BLOCK_D)
        elif GROUP > 0:
            for first in range(0, D, BLOCK_D):
                round_groups(
                    x_ptr, q_ptr, scale_ptr, row, first, D, x_groups, stride_xm, stride_xd, GROUP,
                    BLOCK_D, E8M0,
                )  # fmt: skip
        else:
            round_row(x_ptr, q_ptr, scale_ptr, row, D, stride_xm, stride_xd, BLOCK_D, E8M0)


_launch = Launcher(align_and_quantize_kernel, chained=True)


def align_and_quantize(
    topk_ids: torch.Tensor,
    out: MoEAlignment,
    block_size: int,
    groups: int,
    expert_map: torch.Tensor | None,
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    group: int,
    e8m0: bool,
    largest: torch.Tensor | None,
) -> None:
    """As ``kernels.align_quantize``, with its outputs."""
    (T, K), D = topk_ids.shape, x.shape[1]
    R, P, B = T * K, out.sorted_ids.numel(), out.expert_ids.numel()
    block_r = min(1024, max(32, power_of_2(R)))
    _launch(
        (groups + T, 1),
        (topk_ids, expert_map, *out, x, q, scale, largest),
        (
            R,
            P,
            B,
            groups,
            0 if expert_map is None else expert_map.shape[0],
            block_size,
            D,
            scale.shape[-1],
            *x.stride(),
        ),
        (K, group, e8m0, block_r, power_of_2(groups), max(group, min(2048, power_of_2(D)))),
        4,
    )
