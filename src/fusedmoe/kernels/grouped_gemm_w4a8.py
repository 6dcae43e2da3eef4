"""The indirect grouped GEMM of fp8 rows and int4 weights, both as fp8 numbers.

As ``kernels/grouped_gemm_quantized_w8a8.py``. Triton body: ``kernels/triton/grouped_gemm_w4a8.py``;
tiles: ``tuning/quantized_tiles.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.grouped_gemm_quantized import (
    check_rows,
    check_weights,
    quantized_gemm_reference,
)
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedTile

LEAST_STEP = 64


def w4a8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    w: QuantizedTensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tile: QuantizedTile,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
    activation_config: ApplyMoEActivationConfig | None = None,
) -> torch.Tensor:
    """c[slot] = act(a[slot // top_k] @ w[expert].T + bias[expert]) for each slot.

    a [rows, D] e4m3 with a_scale fp32 [rows, 1] or [1], as ``quantize_rows`` makes them; w int4
    with scales per row or per group, with or without zero points. Everything else is as in
    ``quantized_gemm``. Products are summed by steps of ``tile.depth`` columns, at least 64, which
    divide the groups, and the steps' sums in fp32. Raises ValueError where shapes, dtypes or
    groups disagree.
    """
    check_weights(w, c, activation)
    check_rows(a, w, c, blocks, top_k, bias)
    _check(a, a_scale, w, tile)
    if a.is_cuda:
        from fusedmoe.kernels.triton.grouped_gemm_w4a8 import launch

        act = device_activation(activation, activation_config)
        launch(a, a_scale, w, c, blocks, tile, top_k, bias, act, True)
        return c
    return w4a8_gemm_reference(
        a, a_scale, w, c, blocks, tile, top_k=top_k, bias=bias, activation=activation,
        activation_config=activation_config,
    )  # fmt: skip


def w4a8_gemm_reference(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    w: QuantizedTensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tile: QuantizedTile,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
    activation_config: ApplyMoEActivationConfig | None = None,
) -> torch.Tensor:
    """The definition, in plain torch, on dequantized operands."""
    return quantized_gemm_reference(
        a.float() * a_scale, w, c, blocks, tile, top_k=top_k, bias=bias, activation=activation,
        activation_config=activation_config,
    )  # fmt: skip


def _check(a: torch.Tensor, a_scale: torch.Tensor, w: QuantizedTensor, tile: QuantizedTile) -> None:
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
