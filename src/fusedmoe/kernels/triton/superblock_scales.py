"""Scales of superblocks with minima, as numbers of their groups.

Grid (cdiv(superblocks, BLOCKS),): data uint8 [superblocks, NBYTES] -> scale and term fp32
[superblocks, 8] (contract: ``kernels/superblock_scales.py``).
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import Launcher, follow_previous
from fusedmoe.kernels.triton.superblocks import scales_of_words, superblock_words

_BLOCKS = 128
_ADDED = tl.constexpr(128.0)


@triton.jit
def eight_sixths(words):
    """Eight numbers of six bits, fp32 [BLOCKS, 8]; ``words`` [BLOCKS] twice hold four each."""
    at = tl.arange(0, 8)[None, :]
    word = tl.where(at < 4, words[0][:, None], words[1][:, None])
    return ((word >> (at % 4 * 8)) & 63).to(tl.float32)


@triton.jit(do_not_specialize=["superblocks"])
def superblock_scales_kernel(
    data_ptr,
    scale_ptr,
    term_ptr,
    superblocks,
    NBYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow_previous(CHAINED)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < superblocks
    both, first, second, third = superblock_words(data_ptr + tl.where(there, block, 0) * NBYTES)
    d, least, scales, minima = scales_of_words(both, first, second, third)
    scale = d[:, None] * eight_sixths(scales)
    term = -least[:, None] * eight_sixths(minima) - _ADDED * scale
    at = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(scale_ptr + at, scale, there[:, None])
    tl.store(term_ptr + at, term, there[:, None])


_launch = Launcher(superblock_scales_kernel, chained=True)


def launch(data: torch.Tensor, scale: torch.Tensor, term: torch.Tensor, nbytes: int) -> None:
    """As ``superblock_scales``, unchecked."""
    superblocks = scale.numel() // 8
    if superblocks:
        grid = -(-superblocks // _BLOCKS), 1
        _launch(grid, (data, scale, term), (superblocks,), (nbytes, _BLOCKS), 4)
