"""The indirect grouped GEMM with both operands in 8 bits: fp8 by fp8, int8 by int8.

As ``kernels/grouped_gemm_quantized.py``. Triton body:
``kernels/triton/grouped_gemm_quantized_w8a8.py``; tiles: ``tuning/quantized_tiles.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.grouped_gemm import blocks_on_host
from fusedmoe.kernels.grouped_gemm_quantized import (
    QuantizedProduct,
    check_product,
    finished_sums,
)
from fusedmoe.kernels.quantize import STORED, quantize_rows_reference
from fusedmoe.quantization.activations import spread
from fusedmoe.quantization.keys import QuantKey

QUANTIZED_GROUP = 128


def w8a8_gemm(
    product: QuantizedProduct,
    a_scale: torch.Tensor | None,
    key: QuantKey,
    c_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``product`` with both operands in 8 bits; c.

    a [rows, D] of the key's dtype with a_scale fp32 [rows, groups] or [1], as ``quantize_rows``
    makes them; or 16-bit rows and a_scale None, where the key has groups of ``tile.depth`` columns:
    they are quantized on the way in, once per tile. c [R, N] in floating point; or, where c_scale
    fp32 [R, ceil(N / 128)] is given, fp8 in groups of 128 features, with scales as the key has
    them.

    fp8 products are summed by steps of ``tile.depth`` columns where scales change with them, and
    the steps' sums in fp32. Raises ValueError where shapes, dtypes or groups disagree.
    """
    check_product(product)
    _check_scales(product, a_scale, key, c_scale)
    if product.a.is_cuda:
        from fusedmoe.kernels.triton.grouped_gemm_quantized_w8a8 import launch

        launch(product, a_scale, c_scale, key.group_shape.col, key.scale_kind == "e8m0")
        return product.c
    return w8a8_gemm_reference(product, a_scale, key, c_scale)


def w8a8_gemm_reference(
    product: QuantizedProduct,
    a_scale: torch.Tensor | None,
    key: QuantKey,
    c_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in plain torch, on dequantized operands; walks the blocks on the host."""
    a, w, c, blocks, tile, top_k, *_ = product
    if a_scale is None:
        a, a_scale = quantize_rows_reference(a, key)
    rows = a.float() * spread(a_scale, key, a.shape[1])
    weights = w.dequantize(torch.float32)
    for slots, expert in blocks_on_host(blocks, tile.slots, c.shape[0], w.shape[0]):
        sums = finished_sums(rows[slots // top_k] @ weights[expert].T, expert, product)
        if c_scale is None:
            c[slots] = sums.to(c.dtype)
        else:
            c[slots], c_scale[slots] = quantize_rows_reference(sums, key)
    return c


def _check_scales(
    product: QuantizedProduct,
    a_scale: torch.Tensor | None,
    key: QuantKey,
    c_scale: torch.Tensor | None,
) -> None:
    a, w, c, _, tile, *_ = product
    fmt, stored = w.format, STORED.get(key.dtype)
    if fmt.element not in ("e4m3", "int8") or not fmt.symmetric or fmt.dtype != stored:
        raise ValueError(f"w8a8_gemm takes no weights {fmt.name} with activations {key}")
    group, columns = fmt.group.col, key.group_shape.col
    for what, size in (("weights", group), ("activations", columns)):
        if size > 0 and size % tile.depth:
            raise ValueError(
                f"steps of {tile.depth} columns do not fit groups of {size} columns of the {what}"
            )
    if a_scale is None:
        if a.dtype not in (torch.float16, torch.bfloat16, torch.float32) or columns != tile.depth:
            raise ValueError(
                f"rows quantized on the way in are floating point in groups of {tile.depth} "
                f"columns, got {a.dtype} and {columns}"
            )
    else:
        groups = 1 if columns == -1 else -(-a.shape[1] // columns)
        if a.dtype != stored or (a_scale.numel() != 1 and a_scale.shape != (a.shape[0], groups)):
            raise ValueError(
                f"a is {a.dtype} with scales {tuple(a_scale.shape)}, expected {stored} with "
                f"{(a.shape[0], groups)}"
            )
    if c_scale is None:
        return
    width = tile.rows // w.shards
    groups = -(-c.shape[1] // QUANTIZED_GROUP)
    if width != QUANTIZED_GROUP or columns != QUANTIZED_GROUP:
        raise ValueError(
            f"c is quantized by tiles of {QUANTIZED_GROUP} features and key groups of as many "
            f"columns; got {width} and {columns}"
        )
    if c.dtype != stored or c_scale.shape != (c.shape[0], groups):
        raise ValueError(
            f"c is {c.dtype} with scales {tuple(c_scale.shape)}, expected {stored} with "
            f"{(c.shape[0], groups)}"
        )
