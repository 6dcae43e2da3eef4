"""Triton's bodies of the quantized GEMMs behind the signatures of their references."""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.kernels.grouped_gemm_packed import is_packed
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.round_rows import ELEMENTS
from fusedmoe.quantization.activations import quantize_activation
from fusedmoe.quantization.keys import PER_TENSOR


def triton_gemm(
    product: QuantizedProduct,
    *,
    a_ordered: bool = False,
    c_order: str = "",
    c_places: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``quantized_gemm_reference``."""
    from fusedmoe.kernels.triton import grouped_gemm_packed, grouped_gemm_quantized

    packed = is_packed(product.w.format)
    module = grouped_gemm_packed if packed else grouped_gemm_quantized
    module.launch(product, a_ordered, c_order, c_places, False)
    return product.c


def triton_w8a8(
    product: QuantizedProduct,
    a_scale: torch.Tensor | None,
    key: Any,
    c_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``w8a8_gemm_reference``."""
    from fusedmoe.kernels.triton.grouped_gemm_quantized_w8a8 import launch

    launch(product, a_scale, c_scale, key.group_shape.col, key.scale_kind == "e8m0")
    return product.c


def triton_round(
    x: torch.Tensor, key: Any, scale: torch.Tensor | None = None, *, order: str = ""
) -> torch.Tensor:
    """As ``round_rows_reference``; a scale for the whole tensor is made as on a GPU."""
    from fusedmoe.kernels.triton.round_rows import launch

    if scale is None and key.group_shape == PER_TENSOR:
        _, scale = quantize_activation(x, key)
    out = torch.full(x.shape, float("nan"), dtype=x.dtype)
    e8m0 = key.scale_kind == "e8m0"
    launch(x, out, scale, ELEMENTS[key.dtype], max(0, key.group_shape.col), e8m0, order)
    return out


def triton_gather(
    x: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    orders: tuple[str, str] = ("", ""),
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``gather_columns_reference``."""
    from fusedmoe.kernels.triton.gather_columns import launch

    launch(x, order, out, topk_ids, expert_map, orders, position)
    return out


def triton_w4a8(product: QuantizedProduct, a_scale: torch.Tensor) -> torch.Tensor:
    """As ``w4a8_gemm_reference``."""
    from fusedmoe.kernels.triton.grouped_gemm_w4a8 import launch

    launch(product, a_scale, False)
    return product.c
