"""Streaming weight rows of quantized matrices through a ring of shared memory, task after task.

A task is (block of slots, tile of weight rows); tasks go round robin over the programs, and the
ring never drains between them. Blocks come from tables, or (LONE) every slot is one, and the ids
are held in registers.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmoe.kernels.triton.hopper_direct_common import live_task, pick_out
from fusedmoe.quantization.tensor import QuantizedTensor

STEP_BYTES = gl.constexpr(128)


@gluon.jit
def issue_rows(descs, ring, bars, stage, rows, byte):
    """128 bytes of TILE / 2 weight rows from each of both places."""
    HALF: gl.constexpr = ring.shape[1] // 2
    bar = bars.index(stage)
    mbarrier.expect(bar, 2 * HALF * STEP_BYTES)
    low = ring.index(stage).slice(0, HALF, 0)
    high = ring.index(stage).slice(HALF, HALF, 0)
    tma.async_copy_global_to_shared(descs[0], [rows[0], byte], bar, low)
    tma.async_copy_global_to_shared(descs[1], [rows[1], byte], bar, high)


@gluon.jit
def expert_of(
    task, tasks, experts, experts_ptr, num_local, TILES: gl.constexpr, LONE: gl.constexpr
):
    """The expert of a task; any, where there is no such task."""
    if LONE:
        return pick_out(experts, task // TILES)
    else:
        block = gl.minimum(task, tasks - 1) // TILES
        expert = gl.load(experts_ptr + block, cache_modifier=".cg")
        return gl.minimum(gl.maximum(expert, 0), num_local - 1)


@gluon.jit
def next_task(task, tasks, programs, experts, TILES: gl.constexpr, LONE: gl.constexpr):
    if LONE:
        return live_task(task + programs, tasks, experts, programs, TILES)
    else:
        return task + programs


class Memory(NamedTuple):
    """Stands in for a tensor in a descriptor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)
def rows_descriptor(
    memory: Memory, rows: int, width: int, stride: int, tile: int
) -> TensorDescriptor:
    """TMA view of a matrix of 8-bit elements in tiles of so many rows by 128 columns."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor(memory, [rows, width], [stride, 1], [tile, STEP_BYTES.value], layout)


def weight_descriptors(
    w: QuantizedTensor, half: int, *, as_bytes: bool = True
) -> tuple[TensorDescriptor, TensorDescriptor, int, int]:
    """Two views of the data whose rows are multiplied side by side, rows of one expert in them, and
    how far below the first tile the second lies."""
    dtype = torch.uint8 if as_bytes else w.data.dtype
    address, width = w.data.data_ptr(), w.data.shape[-1]
    e, N = w.shape[:2]
    if w.shards == 1:
        both = rows_descriptor(Memory(address, dtype), e * N, width, width, half)
        return both, both, N, half
    if w.interleaved:
        low, high = (
            rows_descriptor(
                Memory(address + row * width, dtype), e * N // 2, width, 2 * width, half
            )
            for row in (0, 1)
        )
        return low, high, N // 2, 0
    low = rows_descriptor(Memory(address, dtype), e * N, width, width, half)
    below = rows_descriptor(
        Memory(address + N // 2 * width, dtype), e * N - N // 2, width, width, half
    )
    return low, below, N, 0
