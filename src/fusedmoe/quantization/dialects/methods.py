"""From what a checkpoint stores to the method that holds it."""

from __future__ import annotations

from fusedmoe.config import FusedMoEConfig
from fusedmoe.quantization.dialects.base import (
    LayerSchemes,
)
from fusedmoe.quantization.method_base import FusedMoEMethodBase
from fusedmoe.quantization.quantized import OWNERS, QuantizedFusedMoEMethod
from fusedmoe.selection import Selection, select


def method_of(schemes: LayerSchemes, moe_config: FusedMoEConfig) -> FusedMoEMethodBase:
    """The method of a layer whose experts are stored as ``schemes`` say, and loaded so."""
    method = QuantizedFusedMoEMethod(
        moe_config, schemes.w13.format, schemes.w2.format, activation=schemes.activation
    )
    method.checkpoint_schemes = schemes
    return method


def select_stored(schemes: LayerSchemes, moe_config: FusedMoEConfig) -> Selection:
    """What would run a layer of ``moe_config`` whose experts are stored as ``schemes`` say."""
    method = QuantizedFusedMoEMethod(
        moe_config, schemes.w13.format, schemes.w2.format, activation=schemes.activation
    )
    up, down = ((method.format(owner).key, method.activation(owner)) for owner in OWNERS)
    return select(moe_config, *up, down_keys=down)
