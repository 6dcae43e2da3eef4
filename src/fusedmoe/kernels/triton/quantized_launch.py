"""What the launches of all quantized grouped GEMMs have in common."""

from typing import Any

import torch

from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.triton.grouped_gemm import block_tables
from fusedmoe.kernels.triton.launch import Launcher


def precision_of(a: torch.Tensor) -> str:
    """How ``tl.dot`` multiplies rows of this dtype."""
    return "ieee" if a.dtype == torch.float32 else "tf32"


def launch_product(
    launch: Launcher,
    product: QuantizedProduct,
    operands: tuple[torch.Tensor | None, ...],
    numbers: tuple[int, ...],
    constants: tuple[Any, ...],
) -> None:
    """Launch a kernel whose parameters are: ``operands``, the bias, the tables of blocks; mapped
    ids, R, e, N, D, ``numbers``, the bias's strides, the activation's numbers; TOP_K,
    ``constants``, FORMULA, GATED, and the tile."""
    a, w, c, blocks, tile, top_k, bias, *_ = product
    (R, N), act = c.shape, product.epilogue
    num_blocks, tables, mapped = block_tables(blocks, R, tile.slots)
    if R == 0 or N == 0 or num_blocks == 0:
        return
    features = tile.rows // 2 if act.gated else tile.rows
    bias_strides = (0, 0) if bias is None else bias.stride()
    launch(
        (num_blocks * -(-N // features), 1),
        (*operands, bias, *tables),
        (mapped, R, w.shape[0], N, a.shape[1], *numbers, *bias_strides, *act.numbers),
        (
            *(top_k, *constants, act.formula or None, act.gated),
            *(tile.rows, tile.slots, tile.depth, tile.group),
        ),
        tile.warps,
        tile.stages,
    )
