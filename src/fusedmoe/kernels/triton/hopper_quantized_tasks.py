"""Matrices of 8-bit elements, as TMA views them."""

from functools import lru_cache

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmoe.kernels.triton.hopper_launch import Memory
from fusedmoe.quantization.tensor import QuantizedTensor

STEP_BYTES = gl.constexpr(128)


@lru_cache(maxsize=4096)
def rows_descriptor(
    memory: Memory, rows: int, width: int, stride: int, tile: int
) -> TensorDescriptor:
    """TMA view of a matrix of 8-bit elements in tiles of so many rows by 128 columns."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    return TensorDescriptor(memory, [rows, width], [stride, 1], [tile, STEP_BYTES.value], layout)


def weight_descriptors(
    w: QuantizedTensor, half: int
) -> tuple[TensorDescriptor, TensorDescriptor, int]:
    """Two views of the data whose rows are multiplied side by side, and rows of one expert in
    them. Without shards, the same view twice: the second tile lies ``half`` rows below."""
    dtype = w.data.dtype
    address, width = w.data.data_ptr(), w.data.shape[-1]
    e, N = w.shape[:2]
    if w.shards == 1:
        both = rows_descriptor(Memory(address, dtype), e * N, width, width, half)
        return both, both, N
    if w.interleaved:
        low, high = (
            rows_descriptor(
                Memory(address + row * width, dtype), e * N // 2, width, 2 * width, half
            )
            for row in (0, 1)
        )
        return low, high, N // 2
    low = rows_descriptor(Memory(address, dtype), e * N, width, width, half)
    below = rows_descriptor(
        Memory(address + N // 2 * width, dtype), e * N - N // 2, width, width, half
    )
    return low, below, N
