"""The indirect grouped GEMM of fp8 rows and int4 weights, both as fp8 numbers.

As ``kernels/grouped_gemm_quantized_w8a8.py``. Triton body: ``kernels/triton/grouped_gemm_w4a8.py``;
tiles: ``tuning/quantized_tiles.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.grouped_gemm_quantized import (
    QuantizedProduct,
    check_product,
    quantized_gemm_reference,
)

LEAST_STEP = 64


def w4a8_gemm(product: QuantizedProduct, a_scale: torch.Tensor) -> torch.Tensor:
    """``product`` of fp8 rows and int4 weights; c.

    a [rows, D] e4m3 with a_scale fp32 [rows, 1] or [1], as ``quantize_rows`` makes them; w int4
    with scales per row or per group, with or without zero points. Products are summed by steps of
    ``tile.depth`` columns, at least 64, which divide the groups, and the steps' sums in fp32.
    Raises ValueError where shapes, dtypes or groups disagree.
    """
    check_product(product)
    _check(product, a_scale)
    if product.a.is_cuda:
        from fusedmoe.kernels.triton.grouped_gemm_w4a8 import launch

        launch(product, a_scale, True)
        return product.c
    return w4a8_gemm_reference(product, a_scale)


def w4a8_gemm_reference(product: QuantizedProduct, a_scale: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch, on dequantized operands."""
    return quantized_gemm_reference(product._replace(a=product.a.float() * a_scale))


def _check(product: QuantizedProduct, a_scale: torch.Tensor) -> None:
    a, w, _, _, tile, *_ = product
    group = w.format.group.col
    if w.format.element != "int4" or w.format.act_order:
        raise ValueError(f"w4a8_gemm does not read {w.format.name}")
    if tile.depth < LEAST_STEP or (group > 0 and group % tile.depth):
        raise ValueError(f"steps of {tile.depth} columns and groups of {group} do not fit")
    if a.dtype != torch.float8_e4m3fn or a_scale.shape not in ((1,), (a.shape[0], 1)):
        raise ValueError(
            f"a is {a.dtype} with scales {tuple(a_scale.shape)}, expected torch.float8_e4m3fn with "
            f"(1,) or {(a.shape[0], 1)}"
        )
