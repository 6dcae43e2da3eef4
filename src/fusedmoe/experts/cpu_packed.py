"""bf16 experts on a CPU with weights packed once, for oneDNN to read as they lie.

Without it every product starts by repacking its weights, which for the few rows of decoding takes
longer than reading them. The price is a second copy of the expert weights, so nobody gets it
unasked: ``MoEOptions(experts="cpu_packed")``.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.cpu import CpuExperts
from fusedmoe.experts.cpu_gemm import has_native, onednn_linear
from fusedmoe.experts.cpu_run import Products
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    FusedMoEActivationFormat,
)
from fusedmoe.quantization.keys import QuantKey


class PackedWeights:
    """One weight [e, N, K] as e tensors in oneDNN's own layout."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.experts = [
            torch.ops.mkldnn._reorder_linear_weight(one.detach().contiguous()) for one in weight
        ]

    def linear(self, rows: torch.Tensor, expert: int, out: torch.Tensor) -> object:
        return out.copy_(onednn_linear(rows.contiguous(), self.experts[expert]))


class CpuPackedExperts(CpuExperts):
    """As ``CpuExperts``, from its own packed copy of the layer's weights."""

    name = "cpu_packed"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            devices=frozenset({"cpu"}),
            dtypes=frozenset({torch.bfloat16}),
            batch_invariant=True,
        )

    @classmethod
    def is_supported_config(
        cls,
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        if not has_native(torch.bfloat16):
            return False, "needs a CPU with bf16 instructions and torch's oneDNN"
        return super().is_supported_config(
            moe_config, weight_key, activation_key, activation_format
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weights: Any = layer
        self.products = Products(
            PackedWeights(weights.w13_weight).linear, PackedWeights(weights.w2_weight).linear
        )
