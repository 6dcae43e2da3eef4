"""Launching ``align_few.cu``: of how many slots it makes tables, constants and arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.cuda.program import CudaKernel, source_of
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY

SOURCES = ("quantized_lone_slots.cuh", "align_few.cu")
# Words of bits for each group (one of these), and threads. More slots are not faster this way.
WORDS, WIDTH = (4, 16), 512


class Arguments(ctypes.Structure):
    """The kernel's one parameter, field by field as the source has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "map", "sorted", "experts", "num_post")),
        *((name, ctypes.c_int32) for name in ("R", "P", "B", "num_mapped", "num_local")),
    )


def _kernel(defines: dict[str, int], threads: int, shared: int) -> CudaKernel:
    text = tuple((name, str(value)) for name, value in defines.items())
    return CudaKernel(source_of("instructions.cuh", *SOURCES), "align_few", text, threads, shared)


@lru_cache(maxsize=1024)
def _kernel_of(words: int, groups: int, block_size: int, wide: bool) -> CudaKernel | None:
    """None where bits and table do not fit a program's shared memory."""
    used = -(-(words * 32 + groups * (block_size - 1)) // 4) * 4
    shared = 4 * (used + groups + -(-groups // 32)) + 6 * groups * (words + 1)
    if shared > HOPPER_SHARED_MEMORY:
        return None
    names = "WORDS", "WIDTH", "GROUPS", "BLOCK", "MOST_USED", "ID64"
    numbers = words, WIDTH, groups, block_size, used, int(wide)
    return _kernel(dict(zip(names, numbers, strict=True)), WIDTH, shared)


def align_few(
    ids: torch.Tensor, block_size: int, groups: int, P: int, expert_map: torch.Tensor | None
) -> MoEAlignment | None:
    """As ``align_reference``, where ``expert_map`` drops what is remote; None for more slots or
    groups than a program has room for."""
    R = ids.numel()
    words = next((words for words in WORDS if words * 32 >= R), None)
    wide = ids.dtype == torch.int64
    kernel = None if words is None else _kernel_of(words, groups, block_size, wide)
    if kernel is None:
        return None
    found = MoEAlignment.empty(P, block_size, ids.device)
    arguments = Arguments(
        ids.data_ptr(),
        None if expert_map is None else expert_map.data_ptr(),
        *(one.data_ptr() for one in found),
        R,
        P,
        found.expert_ids.numel(),
        0 if expert_map is None else expert_map.shape[0],
        groups,
    )
    kernel.launch(1, arguments, ids.get_device())
    return found
