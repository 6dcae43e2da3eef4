"""What launchers ask of the tensors they are given, before a kernel runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.tensor import QuantizedTensor

Expected = tuple[str, torch.Tensor | None, tuple[int, ...], torch.dtype]


def check_tensors(expected: Iterable[Expected]) -> None:
    """Raise ValueError for the first (name, tensor, shape, dtype) that is there and differs."""
    for name, tensor, shape, dtype in expected:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}"
            )


def check_quantized_rows(
    layer: LayerTensors[QuantizedTensor],
    rows: int,
    *,
    x_dtype: torch.dtype = torch.bfloat16,
    y_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Raise ValueError for what a layer of quantized weights reads and writes row by row where it
    does not fit topk_ids [T, K] and w2 [e, H, I]: x and out [T, H], act [rows, I] and y [rows, H],
    topk_weights fp32 [T, K]; all in bf16 but for the given dtypes."""
    (T, K), (_, H, I) = layer.topk_ids.shape, layer.w2.shape  # noqa: E741
    weights, ids, out, act, y = layer[3:8]
    check_tensors(
        (
            ("x", layer.x, (T, H), x_dtype),
            ("out", out, (T, H), torch.bfloat16),
            ("act", act, (rows, I), torch.bfloat16),
            ("y", y, (rows, H), y_dtype),
            ("topk_weights", weights, (T, K), torch.float32),
        )
    )
    check_contiguous(topk_weights=weights, topk_ids=ids, act=act, y=y)
    if out.stride(1) != 1:
        raise ValueError(f"rows of out must be dense, its strides are {out.stride()}")


def check_contiguous(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError for the first tensor that is there and not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")
