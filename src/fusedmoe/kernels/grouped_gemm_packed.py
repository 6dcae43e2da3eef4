"""The indirect grouped GEMM for weights that take more than a mask to become numbers.

As ``kernels/grouped_gemm_quantized.py``, for the formats that it does not read: GGUF's superblocks
(q4_k, q5_k, q6_k), floats of six bits (MXFP6), and integers whose columns name their groups
(act-order). Triton body: ``kernels/triton/grouped_gemm_packed.py``; tiles:
``tuning/quantized_tiles.py``.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.column_orders import REPEATS, UNITS
from fusedmoe.kernels.grouped_gemm_quantized import (
    check_orders,
    check_rows,
    check_weights,
    has_packed_bf16,
    quantized_gemm_reference,
)
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor
from fusedmoe.tuning.quantized_tiles import SEXTETS, SUPERBLOCK_COLUMNS, SUPERBLOCKS, QuantizedTile

_ALIGNED_BYTES, _WORD_BYTES = 16, 4


def is_packed(fmt: QuantFormat) -> bool:
    """Whether ``packed_gemm`` reads weights of this format."""
    return fmt.element in SUPERBLOCKS | SEXTETS or fmt.act_order


def packed_gemm(
    a: torch.Tensor,
    w: QuantizedTensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tile: QuantizedTile,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
    activation: MoEActivation | None = None,
    activation_config: ApplyMoEActivationConfig | None = None,
    a_ordered: bool = False,
    c_order: str = "",
    c_places: torch.Tensor | None = None,
) -> torch.Tensor:
    """c[slot] = act(a[slot // top_k] @ w[expert].T + bias[expert]) for each slot.

    Arguments and errors as ``quantized_gemm`` has them. Steps are of 256 columns for superblocks,
    of at least 128 for floats of six bits and of 64 for the rest.
    """
    check_weights(w, c, activation)
    check_rows(a, w, c, blocks, top_k, bias)
    check_orders(a, w, c, a_ordered, c_order, c_places)
    _check_format(w, tile)
    if a_ordered and w.format.element in SEXTETS and tile.depth != REPEATS[UNITS]:
        raise ValueError(f"ordered rows meet {w.format.name} in steps of {REPEATS[UNITS]} columns")
    if a.is_cuda:
        from fusedmoe.kernels.triton.grouped_gemm_packed import launch

        act = None if activation is None else device_activation(activation, activation_config)
        native = a.dtype == torch.bfloat16 and has_packed_bf16(a.device)
        orders = a_ordered, c_order, c_places
        launch(a, w, c, blocks, tile, top_k, bias, act, *orders, native)
        return c
    return packed_gemm_reference(
        a,
        w,
        c,
        blocks,
        tile,
        top_k=top_k,
        bias=bias,
        activation=activation,
        activation_config=activation_config,
        a_ordered=a_ordered,
        c_order=c_order,
        c_places=c_places,
    )


packed_gemm_reference = quantized_gemm_reference
"""The definition is the same for every format: sums over dequantized weights."""


def _check_format(w: QuantizedTensor, tile: QuantizedTile) -> None:
    """Raise ValueError for formats of other kernels, steps that cut them, and unaligned data."""
    fmt, index = w.format, w.group_index
    if not is_packed(fmt):
        raise ValueError(f"packed_gemm does not read {fmt.name}")
    blocks, sextets = fmt.element in SUPERBLOCKS, fmt.element in SEXTETS
    if tile.depth != SUPERBLOCK_COLUMNS if blocks else tile.depth < (128 if sextets else 64):
        raise ValueError(f"steps of {tile.depth} columns do not fit {fmt.name}")
    places = w.data.data_ptr(), *w.data.stride()[:2]
    if sextets and any(place % _WORD_BYTES for place in places):
        raise ValueError(f"rows of {fmt.name} must lie at a multiple of {_WORD_BYTES} bytes")
    if blocks and w.data.data_ptr() % _ALIGNED_BYTES:
        raise ValueError(f"superblocks must lie at a multiple of {_ALIGNED_BYTES} bytes")
    if index is not None and not index.is_contiguous():
        raise ValueError(f"group_index must be contiguous, its strides are {index.stride()}")
    if index is not None and w.scale is not None and w.scale.shape[-1] == 0 and w.shape[2] > 0:
        raise ValueError(f"{w.shape[2]} columns of {fmt.name} have no groups to belong to")
