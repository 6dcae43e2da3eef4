"""FusedMoEQuantConfig: how the kernels of one layer compute, and with which scales and biases."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fusedmoe.quantization.keys import PER_TENSOR, GroupShape, QuantKey, ScaleKind
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor


@dataclass(frozen=True, kw_only=True)
class FusedMoEQuantDesc:
    """One operand. ``dtype`` None is unquantized; ``scale`` and the rest follow its format.

    A weight has a ``format``, and its ``scale``, ``scale2``, ``zp`` and ``group_index`` are the
    parts of a ``QuantizedTensor`` whose data is the weight itself. An activation with a ``scale``
    (fp32 [1]) is quantized with it, one without by its values; ``scale_kind`` "e8m0" rounds such
    scales up to powers of two. ``alpha_or_gscale`` is what the API reference calls so: 1 / scale of
    an activation, the product of both global scales of a weight.
    """

    dtype: torch.dtype | str | None = None
    shape: GroupShape | None = None
    scale: torch.Tensor | None = None
    alpha_or_gscale: torch.Tensor | None = None
    zp: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale2: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    format: QuantFormat | None = None
    scale_kind: ScaleKind = "float"

    @property
    def key(self) -> QuantKey | None:
        """What selection compares; None for an operand that is not quantized."""
        if self.format is not None:
            return self.format.key
        if self.dtype is None:
            return None
        return QuantKey(
            self.dtype,
            self.scale is not None,
            self.shape or PER_TENSOR,
            scale_kind="e4m3" if self.dtype == "nvfp4" else self.scale_kind,
            second_scale=self.dtype == "nvfp4",
        )

    def weight(
        self,
        data: torch.Tensor,
        dtype: torch.dtype,
        *,
        shards: int = 1,
        interleaved: bool = False,
    ) -> QuantizedTensor:
        """``data`` [e, N, packed columns] with the parts described here.

        ``shards`` and ``interleaved`` as ``QuantizedTensor`` has them. Raises ValueError where the
        parts do not fit the data.
        """
        fmt = self.format
        if fmt is None:
            raise ValueError("these weights are not quantized")
        *lead, columns = data.shape
        K = columns // fmt.type.stored * fmt.values
        scale = self.scale
        if scale is not None and scale.dim() == len(lead) - 1 and fmt.group == PER_TENSOR:
            scale = scale.unsqueeze(-1)  # [e]: one shard
        return QuantizedTensor(
            format=fmt,
            data=data,
            scale=scale,
            shape=(*lead, K),
            dtype=dtype,
            scale2=self.scale2,
            zero_point=self.zp,
            group_index=self.group_index,
            shards=shards,
            interleaved=interleaved,
        )


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
