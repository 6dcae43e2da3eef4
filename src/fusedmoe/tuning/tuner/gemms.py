"""One GEMM of a layer as the Triton experts call it, by itself."""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.bench.problems import Weights
from fusedmoe.bench.shapes import SWIGLUOAI_LIMIT, LayerShape
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.grouped_gemm import grouped_gemm
from fusedmoe.tuning.choice import layer_key
from fusedmoe.tuning.tiles import TileConfig
from fusedmoe.tuning.tuned_table import LayerKey


def activation_of(shape: LayerShape) -> tuple[MoEActivation, ApplyMoEActivationConfig]:
    """The activation of a shape, with the numbers that its family has."""
    limit = SWIGLUOAI_LIMIT if shape.activation == "swigluoai" else None
    return MoEActivation.from_str(shape.activation), ApplyMoEActivationConfig(clamp_limit=limit)


def key_of(shape: LayerShape, dtype: torch.dtype) -> LayerKey:
    """What a table of this shape says it is for."""
    return layer_key(shape.k, shape.E, shape.H, shape.I, dtype, activation_of(shape)[0])


def run_gemm(
    shape: LayerShape,
    stage: str,
    tile: TileConfig,
    weights: Weights,
    a: torch.Tensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
) -> torch.Tensor:
    """a [T, H] -> c [R, I] for "gemm1", a [R, I] -> c [R, H] for "gemm2"; returns ``c``."""
    if stage == "gemm2":
        return grouped_gemm(a, weights.w2, c, blocks, tile, top_k=1, bias=weights.b2)
    activation, config = activation_of(shape)
    return grouped_gemm(
        a,
        weights.w1,
        c,
        blocks,
        tile,
        top_k=shape.k,
        bias=weights.b1,
        activation=activation,
        activation_config=config,
    )
