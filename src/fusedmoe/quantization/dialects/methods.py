"""From what a checkpoint stores to the method that holds it."""

from __future__ import annotations

from fusedmoe.config import FusedMoEConfig
from fusedmoe.quantization.dialects.base import Scheme
from fusedmoe.quantization.method_base import FusedMoEMethodBase
from fusedmoe.quantization.quantized import QuantizedFusedMoEMethod


def method_of(scheme: Scheme, moe_config: FusedMoEConfig) -> FusedMoEMethodBase:
    """The method of a layer whose experts are stored as ``scheme`` says, and loaded so."""
    method = QuantizedFusedMoEMethod(moe_config, scheme.format, activation=scheme.activation)
    method.checkpoint_scheme = scheme
    return method
