"""Experts as they were trained: fp32, fp16 or bf16 weights, no scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusedmoe.quantization.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEQuantConfig,
    biased_moe_quant_config,
)
from fusedmoe.quantization.method_base import FusedMoEMethodBase
from fusedmoe.weights.param_spec import BIASES, WEIGHTS, ParamSpec

if TYPE_CHECKING:
    from fusedmoe.weights.routed_experts import RoutedExperts


class UnquantizedFusedMoEMethod(FusedMoEMethodBase):
    """Holds a layer's experts as floats, and has their kernel chosen: w13_weight [e, S * I, H],
    w2_weight [e, H, I], and where the layer has them biases [e, S * I] and [e, H]."""

    def param_specs(self) -> tuple[ParamSpec, ...]:
        return WEIGHTS + BIASES if self.moe_config.has_bias else WEIGHTS

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        if not self.moe_config.has_bias:
            return FUSED_MOE_UNQUANTIZED_CONFIG
        return biased_moe_quant_config(layer.w13_bias, layer.w2_bias)

    def input_dtype(self, layer: RoutedExperts) -> torch.dtype:
        return layer.w13_weight.dtype

    @property
    def supports_eplb(self) -> bool:
        return True
