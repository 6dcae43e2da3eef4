"""FusedMoEQuantConfig: how the kernels of one layer compute, and with which scales and biases."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fusedmoe.quantization.keys import GroupShape


@dataclass(frozen=True, kw_only=True)
class FusedMoEQuantDesc:
    """One operand. ``dtype`` None is unquantized; ``scale`` and the rest follow its format."""

    dtype: torch.dtype | str | None = None
    shape: GroupShape | None = None
    scale: torch.Tensor | None = None
    alpha_or_gscale: torch.Tensor | None = None
    zp: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FusedMoEQuantConfig:
    """The four operands of a layer (two activations, two weights) and the first GEMM's numbers."""

    a1: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    a2: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    w1: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    w2: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None

    @property
    def w1_bias(self) -> torch.Tensor | None:
        """[e, S * I] or None, added to the first GEMM's output."""
        return self.w1.bias

    @property
    def w2_bias(self) -> torch.Tensor | None:
        """[e, H] or None, added to the second GEMM's output before the router weight."""
        return self.w2.bias

    @property
    def is_quantized(self) -> bool:
        return any(desc.dtype is not None for desc in (self.a1, self.a2, self.w1, self.w2))


FUSED_MOE_UNQUANTIZED_CONFIG = FusedMoEQuantConfig()


def biased_moe_quant_config(
    w1_bias: torch.Tensor | None, w2_bias: torch.Tensor | None
) -> FusedMoEQuantConfig:
    """Unquantized weights with biases [e, S * I] and [e, H]."""
    plain = FusedMoEQuantDesc()  # given, not defaulted: torch.compile cannot trace the factories
    return FusedMoEQuantConfig(
        a1=plain,
        a2=plain,
        w1=FusedMoEQuantDesc(bias=w1_bias),
        w2=FusedMoEQuantDesc(bias=w2_bias),
    )
