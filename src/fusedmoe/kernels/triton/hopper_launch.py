"""Launching a Gluon kernel whose matrices are read and written by TMA, again and again.

As ``launch.Launcher``: which compiled variant a launch needs is looked up here, because Triton
takes longer to find out than a small layer's kernels run. What TMA must know of a matrix is kept
as well: an address and sizes, nothing that would hold on to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmoe.kernels.capture import loads_code
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS

_Case = TypeVar("_Case")
_MAX_VARIANTS = 4096
_ALIGNMENT = 16
_ELEMENTS = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.int32: gl.int32,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


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
    tile = [tile_rows, tile_columns]
    layout = gl.NVMMASharedLayout.get_default_for(tile, _ELEMENTS[memory.dtype])
    return TensorDescriptor(memory, [rows, columns], [stride, 1], tile, layout)


def matrix_descriptor(
    tensor: torch.Tensor,
    columns: int,
    tile: tuple[int, int],
    *,
    first: int = 0,
    step: int = 1,
    stride: int | None = None,
    dtype: torch.dtype | None = None,
) -> TensorDescriptor:
    """A TMA view of a tensor as a matrix of ``columns`` columns, in tiles of [rows, columns].

    It has the rows first, first + step, ..., with ``stride`` elements from one row of the tensor to
    the next (default: ``columns``). Elements are of ``dtype`` (default: the tensor's).
    """
    stride, dtype = columns if stride is None else stride, dtype or tensor.dtype
    rows = tensor.shape[0] if tensor.dim() == 2 else tensor.nbytes // (columns * dtype.itemsize)
    memory = Memory(tensor.data_ptr() + first * stride * dtype.itemsize, dtype)
    return _descriptor(memory, -((first - rows) // step), columns, stride * step, *tile)


def weight_views(
    data: torch.Tensor,
    shards: int,
    interleaved: bool,
    tile: tuple[int, int],
    dtype: torch.dtype | None = None,
) -> tuple[TensorDescriptor, TensorDescriptor, int]:
    """Two views of weights [e, shards * N, D], contiguous, in which gate and up of a feature have
    the same row number, and how many rows one expert has in them; of a single shard, the same view
    twice. Elements are of ``dtype`` (default: the data's)."""
    dtype, rows = dtype or data.dtype, data.shape[1]
    columns = data.shape[2] * data.itemsize // dtype.itemsize

    def view(first: int, step: int) -> TensorDescriptor:
        return matrix_descriptor(data, columns, tile, first=first, step=step, dtype=dtype)

    if shards == 1:
        both = view(0, 1)
        return both, both, rows
    if interleaved:
        return view(0, 2), view(1, 2), rows // 2
    return view(0, 1), view(rows // 2, 1), rows


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


def kept(case: Callable[..., _Case]) -> Callable[..., _Case]:
    """The constructor ``case``, whose results are kept: to make one takes longer than to look up a
    launch's variant by it."""
    return lru_cache(maxsize=_MAX_VARIANTS)(case)


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
