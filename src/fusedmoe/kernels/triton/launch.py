"""Launching a Triton kernel again without asking Triton again which compiled variant it is.

Triton binds, specialises and hashes every argument on every launch, which takes longer than a small
layer's kernels run. A variant depends on the tensors' dtypes and alignment, on the numbers and on
the constants alone, so those are looked up here and the compiled kernel is called directly.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedmoe.kernels.capture import loads_code
from fusedmoe.kernels.releases import is_known

# How a compiled kernel is called is private to Triton; in unknown releases Triton launches it.
_KNOWS_CALLING_CONVENTION = is_known(triton.__version__)
_MAX_VARIANTS = 4096
_ALIGNMENT = 16


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1; Triton's own takes microseconds."""
    return 1 << (n - 1).bit_length()


@lru_cache
def _can_chain(device: int) -> bool:
    """Whether this GPU has programmatic dependent launches."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def follow_previous(CHAINED: tl.constexpr):
    """The first line of a chained kernel: programs are set up beside the launch before and wait
    here for its end; then the next launch may be set up, too."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def stand_between(CHAINED: tl.constexpr):
    """As ``follow_previous``, for a short kernel between two long ones: the launch after it, which
    waits for it, may begin beside it."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()


class Launcher:
    """``kernel`` with its parameters in this order: tensors, numbers, constants (constexpr).

    Tensors may be None. The first one says on which device to run. Unaligned tensors, kernels under
    the interpreter and other devices than the current one take Triton's own way.

    ``chained``: the kernel has one more constant, CHAINED, and hands it to ``follow_previous`` (or
    ``stand_between``); where the GPU can, the kernel is set up while the launch before it ends.
    """

    def __init__(self, kernel: Any, *, chained: bool = False) -> None:
        self.kernel = kernel
        self._chained = chained
        self._direct = _KNOWS_CALLING_CONVENTION and isinstance(kernel, triton.runtime.JITFunction)
        self._variants: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float | None, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int = 3,
    ) -> None:
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        if self._chained:
            constants = (*constants, self._direct and device >= 0 and _can_chain(device))
        if not self._direct or device < 0:
            self._launch(grid, tensors, numbers, constants, num_warps, num_stages)
            return
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, tensors, numbers, constants, num_warps, num_stages)
            return
        bits = 0
        dtypes: list[torch.dtype | None] = []
        for tensor in tensors:
            if tensor is None:
                dtypes.append(None)
            else:
                bits |= tensor.data_ptr()
                dtypes.append(tensor.dtype)
        if bits % _ALIGNMENT:
            self._launch(grid, tensors, numbers, constants, num_warps, num_stages)
            return
        key = (*dtypes, numbers, constants, num_warps, num_stages, device)
        variant = self._variants.get(key)
        if variant is None:
            with loads_code():
                compiled = self._launch(grid, tensors, numbers, constants, num_warps, num_stages)
            if len(self._variants) >= _MAX_VARIANTS:
                self._variants.clear()
            self._variants[key] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = variant
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(
            grid[0],
            grid[1],
            1,
            stream,
            function,
            metadata,
            None,
            None,
            None,
            *tensors,
            *numbers,
            *constants,
        )

    def _launch(
        self,
        grid: tuple[int, int],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float | None, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int,
    ) -> Any:
        options = {"launch_pdl": True} if self._chained and constants[-1] else {}
        return self.kernel[grid](
            *tensors,
            *numbers,
            *constants,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
            **options,
        )
