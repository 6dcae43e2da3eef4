"""Launching a Gluon kernel whose matrices are read and written by TMA, again and again.

As ``launch.Launcher``: which compiled variant a launch needs is looked up here, because Triton
takes longer to find out than a small layer's kernels run. What TMA must know of a matrix is kept
as well: an address and sizes, nothing that would hold on to memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.capture import loads_code
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS

_MAX_VARIANTS = 4096
_ALIGNMENT = 16


class Memory(NamedTuple):
    """Stands in for a tensor in a descriptor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)
def _descriptor(
    memory: Memory, rows: int, columns: int, stride: int, tile_rows: int, tile_columns: int
) -> TensorDescriptor:
    dtypes = {torch.float16: gl.float16, torch.float32: gl.float32}
    tile = [tile_rows, tile_columns]
    layout = gl.NVMMASharedLayout.get_default_for(tile, dtypes.get(memory.dtype, gl.bfloat16))
    return TensorDescriptor(memory, [rows, columns], [stride, 1], tile, layout)


def matrix_descriptor(
    tensor: torch.Tensor,
    columns: int,
    tile: tuple[int, int],
    *,
    first: int = 0,
    step: int = 1,
    stride: int | None = None,
) -> TensorDescriptor:
    """TMA view, in tiles of [rows, columns], of a tensor as a matrix of so many ``columns``.

    It has the rows first, first + step, ..., with ``stride`` elements from one row of the tensor to
    the next (default: ``columns``).
    """
    stride = columns if stride is None else stride
    rows = tensor.shape[0] if tensor.dim() == 2 else tensor.numel() // columns
    address = tensor.data_ptr() + first * stride * tensor.element_size()
    memory = Memory(address, tensor.dtype)
    return _descriptor(memory, -((first - rows) // step), columns, stride * step, *tile)


def gate_up_descriptors(
    w1: torch.Tensor,
    I: int,  # noqa: E741
    activation: DeviceActivation,
    tile: tuple[int, int],
) -> tuple[TensorDescriptor, TensorDescriptor, int]:
    """Two views of w1 [e, S * I, H] in which gate and up of a column have the same row number, and
    how many rows one expert has in them. Without a gate, w1 twice."""
    width, H = w1.shape[1:]
    if not activation.gated:
        both = matrix_descriptor(w1, H, tile)
        return both, both, I
    if activation.interleaved:
        gate = matrix_descriptor(w1, H, tile, step=2)
        return gate, matrix_descriptor(w1, H, tile, first=1, step=2), I
    return matrix_descriptor(w1, H, tile), matrix_descriptor(w1, H, tile, first=I), width


def task_counters(sorted_ids: torch.Tensor, rows: int, launches: int = 2) -> Sequence[torch.Tensor]:
    """Where the programs of up to four launches count the tasks that they draw: cache lines of
    their own in the last COUNTER_SLOTS of the table of slots, padding behind ``rows`` places.
    Counted up, so a table serves once. ValueError if the table is shorter."""
    if sorted_ids.shape[0] < rows + COUNTER_SLOTS:
        raise ValueError(
            f"a table of {sorted_ids.shape[0]} slots for {rows} rows has no room for "
            f"{COUNTER_SLOTS} counters"
        )
    return sorted_ids[-COUNTER_SLOTS:].chunk(launches)


class HopperLauncher:
    """``kernel`` with its parameters in this order: matrices, tensors, numbers, constants.

    Tensors may be None. The current device is theirs. ``options`` are the compiler's.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._variants: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def __call__(
        self,
        programs: int,
        matrices: tuple[TensorDescriptor, ...],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float | None, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> None:
        bits = 0
        dtypes: list[torch.dtype | None] = []
        for tensor in tensors:
            if tensor is None:
                dtypes.append(None)
            else:
                bits |= tensor.data_ptr()
                dtypes.append(tensor.dtype)
        arguments = (*matrices, *tensors, *numbers, *constants)
        device = torch.cuda.current_device()
        tiles = [(one.base.dtype, *one.block_shape) for one in matrices]
        key = (*tiles, *dtypes, numbers, constants, *options.values(), device)
        variant = None if bits % _ALIGNMENT else self._variants.get(key)
        if variant is None:
            with loads_code():
                compiled = self.kernel[(programs,)](
                    *arguments, **options, launch_pdl=True, enable_fp_fusion=True
                )
            if not bits % _ALIGNMENT:
                if len(self._variants) >= _MAX_VARIANTS:
                    self._variants.clear()
                self._variants[key] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = variant
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
