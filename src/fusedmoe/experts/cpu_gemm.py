"""Which of torch's matrix products a CPU runs fastest for the few rows of one expert.

The shapes are unusual for a BLAS: weights [N, K] of megabytes, read once, for M = 1..100 rows. What
was measured (two Zen 5 cores with AVX-512 BF16, torch 2.13; ``benchmarks/cpu_layer.py``):

- fp32, M = 1: MKL runs a matrix-vector product on one core. A batched product over slices of the
  weights runs on all of them: 2 to 3 times faster.
- fp32, weights of up to 2^16 elements: what stands around a product costs more than the product.
- fp32, M > 2: oneDNN has AVX-512 kernels on every x86, MKL only on some: 2 to 2.5 times faster.
- bf16: oneDNN repacks the weights in each call, which takes longer than reading them up to M = 32.
  No other product avoids it; weights packed beforehand do (``cpu_packed.py``).
- 16-bit floats that the CPU has no instructions for: converting the weights and multiplying in fp32
  wins from M = 5 on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""x [M, K], weight [N, K], out [M, N]: writes x times the transposed weight into ``out``."""

_SLICES = (8, 4, 16, 2, 6, 3, 5, 7)
_MIN_SLICE_ROWS = 32
_FP32_SLICED_ROWS = 2
_FP32_SLICED_ROWS_NARROW = 4
_FP32_NARROW = 1024
_FP32_SMALL = 1 << 16
_EMULATED_ROWS = 4


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def has_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` on this CPU without going through fp32."""
    if dtype is torch.float32:
        return True
    if not _has_onednn():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def linear_for(dtype: torch.dtype) -> Linear:
    """The product for one expert's rows and weight, both of ``dtype``.

    Its sums are fp32. Which kernel runs depends on M, so the last bits of a row do too.
    """
    if dtype is torch.float32:
        return _fp32_linear
    return _native_linear if has_native(dtype) else _emulated_linear


def _native_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def _fp32_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if weight.numel() <= _FP32_SMALL:
        torch.mm(x, weight.t(), out=out)
        return
    M, K = x.shape
    most = _FP32_SLICED_ROWS_NARROW if K <= _FP32_NARROW else _FP32_SLICED_ROWS
    out.copy_(_sliced(x, weight) if most >= M else onednn_linear(x, weight))


def _emulated_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if x.shape[0] <= _EMULATED_ROWS:
        torch.mm(x, weight.t(), out=out)
        return
    wide = x.new_empty(out.shape, dtype=torch.float32)
    _fp32_linear(x.float(), weight.float(), wide)
    out.copy_(wide)


def slices_of(num_rows: int) -> int:
    """How many equal slices to cut the N rows of a weight into (1: it does not divide)."""
    for slices in _SLICES:
        if num_rows % slices == 0 and num_rows // slices >= _MIN_SLICE_ROWS:
            return slices
    return 1


def _sliced(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One product per slice of the weight's rows, as a batch: [s, N / s, M]."""
    slices = slices_of(weight.shape[0])
    if slices == 1:
        return onednn_linear(x, weight)
    columns = x.t().expand(slices, x.shape[1], x.shape[0])
    return torch.bmm(weight.unflatten(0, (slices, -1)), columns).flatten(0, 1).t()


def onednn_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed; the weight may be one that oneDNN packed."""
    if not _has_onednn():
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
