"""One maximum per block of words. Grid cdiv(n, BLOCK): words int32 [n] -> found int32 [grid]."""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import Launcher

LOWEST = tl.constexpr(-(2**31))


@triton.jit
def read_all_kernel(words_ptr, found_ptr, n, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(found_ptr + block, tl.max(tl.load(words_ptr + at, mask=at < n, other=LOWEST), 0))


_launch = Launcher(read_all_kernel)


def read_all(words: torch.Tensor, found: torch.Tensor, block: int) -> None:
    _launch((found.numel(), 1), (words, found), (words.numel(),), (block,), 4)
