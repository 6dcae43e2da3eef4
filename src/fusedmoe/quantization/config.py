"""FusedMoEQuantConfig: how the kernels of one layer compute, and with which scales and biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fusedmoe.quantization.desc import FusedMoEQuantDesc, QuantDtype, activation_desc, weight_desc
from fusedmoe.quantization.keys import PER_ROW, PER_TENSOR, PER_TOKEN, GroupShape, ScaleKind

__all__ = [
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "FusedMoEQuantConfig",
    "FusedMoEQuantDesc",
    "biased_moe_quant_config",
]

_FP8, _INT8 = torch.float8_e4m3fn, torch.int8


class _Uses:
    """A property: whether a config's (weights, activations) are one of ``pairs``."""

    def __init__(self, *pairs: tuple[QuantDtype, QuantDtype | None]) -> None:
        self.pairs = pairs

    def __get__(self, config: FusedMoEQuantConfig | None, owner: type) -> bool:
        if config is None:  # asked of the class
            return self  # type: ignore[return-value]
        return (config.weight_quant_dtype, config.quant_dtype) in self.pairs


@dataclass(frozen=True, kw_only=True)
class FusedMoEQuantConfig:
    """How the four operands of a layer (two activations, two weights) are quantized.

    ``gemm1_alpha``, ``gemm1_beta`` and ``gemm1_clamp_limit`` are the activation function's numbers,
    where they are to replace the layer's own (``swiglu_alpha``, ``swiglu_beta``, ``swiglu_limit``).
    ``is_scale_swizzled``, ``is_scale_transposed`` and ``mx_alignment`` are hints about the scales
    of activations for kernels of other packages; ours take none of them.
    """

    a1: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    a2: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    w1: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    w2: FusedMoEQuantDesc = field(default_factory=FusedMoEQuantDesc)
    is_scale_swizzled: bool = True
    is_scale_transposed: bool = False
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    mx_alignment: int = 0

    @staticmethod
    def make(
        quant_dtype: QuantDtype | None = None,
        per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False,
        block_shape: Sequence[int] | None = None,
        w1_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        a1_scale: torch.Tensor | None = None,
        a2_scale: torch.Tensor | None = None,
        g1_alphas: torch.Tensor | None = None,
        g2_alphas: torch.Tensor | None = None,
        a1_gscale: torch.Tensor | None = None,
        a2_gscale: torch.Tensor | None = None,
        w1_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        w1_zp: torch.Tensor | None = None,
        w2_zp: torch.Tensor | None = None,
        weight_dtype: QuantDtype | None = None,
        is_scale_swizzled: bool = True,
        gemm1_alpha: float | None = None,
        gemm1_beta: float | None = None,
        gemm1_clamp_limit: float | None = None,
        *,
        w1_group_index: torch.Tensor | None = None,
        w2_group_index: torch.Tensor | None = None,
        act_scale_kind: ScaleKind = "float",
    ) -> FusedMoEQuantConfig:
        """Build one from tensors in the canonical layout (``quantization/tensor.py``).

        ``quant_dtype`` is the activations' element type (None: not quantized), ``weight_dtype`` the
        weights' (None: the same): fp8 e4m3, int8, or "int4", "mxfp4", "mxfp8", "mxfp6_e3m2",
        "mxfp6_e2m3", "nvfp4". ``block_shape`` (rows, columns): what shares a weight's scale, rows 0
        or 1 meaning each row its own; activations then share scales per token and ``columns``.
        Without it ``per_out_ch_quant`` (weights) and ``per_act_token_quant`` (activations) give
        each row its own scale, and all of a tensor has one otherwise. ``a*_scale`` [1] make
        activations static. For nvfp4 ``g*_alphas`` [e] or [e, S] are the weights' second scales
        times the activations', ``a*_gscale`` the inverses of the latter. ``w*_group_index``: see
        ``quantization/tensor.py``. ``act_scale_kind`` "e8m0" rounds activations' own scales up to
        powers of two.

        Raises ValueError for contradictions and for weights without scales.
        """
        flags = per_act_token_quant or per_out_ch_quant
        if block_shape is not None and (flags or len(block_shape) != 2):
            raise ValueError(
                f"block_shape {list(block_shape)} must be (rows, columns), without "
                f"per_act_token_quant ({per_act_token_quant}) and per_out_ch_quant "
                f"({per_out_ch_quant})"
            )
        blocks = None if block_shape is None else GroupShape(max(block_shape[0], 1), block_shape[1])
        activations = (quant_dtype, blocks, per_act_token_quant)
        weights = quant_dtype if weight_dtype is None else weight_dtype, blocks, per_out_ch_quant
        return FusedMoEQuantConfig(
            a1=activation_desc(*activations, a1_scale, a1_gscale, act_scale_kind),
            a2=activation_desc(*activations, a2_scale, a2_gscale, act_scale_kind),
            w1=weight_desc(
                "w1",
                *weights,
                w1_scale,
                alphas=g1_alphas,
                gscale=a1_gscale,
                zp=w1_zp,
                group_index=w1_group_index,
                bias=w1_bias,
            ),
            w2=weight_desc(
                "w2",
                *weights,
                w2_scale,
                alphas=g2_alphas,
                gscale=a2_gscale,
                zp=w2_zp,
                group_index=w2_group_index,
                bias=w2_bias,
            ),
            is_scale_swizzled=is_scale_swizzled,
            gemm1_alpha=gemm1_alpha,
            gemm1_beta=gemm1_beta,
            gemm1_clamp_limit=gemm1_clamp_limit,
        )

    @property
    def quant_dtype(self) -> QuantDtype | None:
        """Element type of the activations; None where they are not quantized."""
        return self.a1.dtype

    @property
    def weight_quant_dtype(self) -> QuantDtype | None:
        """Element type of the weights; None where they are not quantized."""
        return self.w1.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether any of the four operands is."""
        return any(desc.dtype is not None for desc in (self.a1, self.a2, self.w1, self.w2))

    @property
    def is_per_act_token(self) -> bool:
        """Whether each token has one scale of its own."""
        return self.a1.shape == PER_TOKEN

    @property
    def per_act_token_quant(self) -> bool:
        """As ``is_per_act_token``, under the name of ``make``'s argument."""
        return self.is_per_act_token

    @property
    def per_out_ch_quant(self) -> bool:
        """Whether each output channel of the weights has one scale."""
        return self.w1.shape == PER_ROW

    @property
    def is_per_tensor(self) -> bool:
        """Whether all activations share one scale."""
        return self.a1.shape == PER_TENSOR

    @property
    def is_block_quantized(self) -> bool:
        """Whether activations have a scale per token and group of columns."""
        return self.a1.shape is not None and self.a1.shape.col > 0

    @property
    def block_shape(self) -> list[int] | None:
        """[rows, columns] that share a scale of the weights, where that is a block or a group."""
        shape = self.w1.shape
        return [shape.row, shape.col] if shape is not None and shape.col > 0 else None

    @property
    def a1_scale(self) -> torch.Tensor | None:
        """fp32 [1], of static activations; None computes scales from the values."""
        return self.a1.scale

    @property
    def a2_scale(self) -> torch.Tensor | None:
        """As ``a1_scale``, of the rows between the two products."""
        return self.a2.scale

    @property
    def a1_gscale(self) -> torch.Tensor | None:
        """[1] or [e], inverses of the activations' second scales (nvfp4)."""
        return self.a1.alpha_or_gscale

    @property
    def a2_gscale(self) -> torch.Tensor | None:
        """As ``a1_gscale``, of the rows between the two products."""
        return self.a2.alpha_or_gscale

    @property
    def w1_scale(self) -> torch.Tensor | None:
        """As ``QuantizedTensor.scale``."""
        return self.w1.scale

    @property
    def w2_scale(self) -> torch.Tensor | None:
        """As ``QuantizedTensor.scale``."""
        return self.w2.scale

    @property
    def w1_zp(self) -> torch.Tensor | None:
        """As ``QuantizedTensor.zero_point``."""
        return self.w1.zp

    @property
    def w2_zp(self) -> torch.Tensor | None:
        """As ``QuantizedTensor.zero_point``."""
        return self.w2.zp

    @property
    def g1_alphas(self) -> torch.Tensor | None:
        """[e] or [e, S], w1's second scales, times the activations' where these have one."""
        return self.w1.alpha_or_gscale

    @property
    def g2_alphas(self) -> torch.Tensor | None:
        """As ``g1_alphas``, [e], of w2."""
        return self.w2.alpha_or_gscale

    @property
    def w1_bias(self) -> torch.Tensor | None:
        """[e, S * I] or None, added to the first GEMM's output."""
        return self.w1.bias

    @property
    def w2_bias(self) -> torch.Tensor | None:
        """[e, H] or None, added to the second GEMM's output before the router weight."""
        return self.w2.bias

    use_fp8_w8a8 = _Uses((_FP8, _FP8))
    use_fp8_w8a16 = _Uses((_FP8, None))
    use_int8_w8a8 = _Uses((_INT8, _INT8))
    use_int8_w8a16 = _Uses((_INT8, None))
    use_int4_w4a16 = _Uses(("int4", None))
    use_int4_w4afp8 = _Uses(("int4", _FP8))
    use_mxfp4_w4a16 = _Uses(("mxfp4", None))
    use_mxfp4_w4a4 = _Uses(("mxfp4", "mxfp4"))
    use_mxfp4_w4a8 = _Uses(("mxfp4", _FP8), ("mxfp4", "mxfp8"))
    use_nvfp4_w4a16 = _Uses(("nvfp4", None))
    use_nvfp4_w4a4 = _Uses(("nvfp4", "nvfp4"))

    @property
    def ocp_mx_scheme(self) -> str | None:
        """w_mxfp4, w_mxfp4_a_mxfp4, w_mxfp6_e3m2_a_fp8, ... for weights in 4- or 6-bit MX."""
        weights, activations = self.weight_quant_dtype, self.quant_dtype
        if not isinstance(weights, str) or not weights.startswith(("mxfp4", "mxfp6")):
            return None
        if activations is None:
            return f"w_{weights}"
        return f"w_{weights}_a_{'fp8' if activations == _FP8 else activations}"

    def config_name(self, dtype: torch.dtype) -> str | None:
        """What tables of tuned sizes call this scheme, for a layer of ``dtype``; None: plain."""
        for name in ("fp8_w8a8", "fp8_w8a16", "int8_w8a8", "int8_w8a16", "int4_w4a16"):
            if getattr(self, f"use_{name}"):
                return name
        if self.ocp_mx_scheme is not None:
            return self.ocp_mx_scheme
        return "float32" if dtype == torch.float32 else None

    def scale_shape(self, max_tokens: int, hidden_dim: int) -> tuple[int, int] | None:
        """The shape of the scales of [max_tokens, hidden_dim]; None: there are none."""
        shape = self.a1.shape
        if self.quant_dtype is None or shape is None:
            return None
        if shape == PER_TENSOR:
            return (1, 1)
        return (max_tokens, 1 if shape.col == -1 else -(-hidden_dim // shape.col))

    def batched_scale_shape(
        self, num_experts: int, max_tokens: int, hidden_dim: int
    ) -> tuple[int, int, int] | None:
        """As ``scale_shape``, for each of ``num_experts``."""
        shape = self.scale_shape(max_tokens, hidden_dim)
        return None if shape is None else (num_experts, *shape)


FUSED_MOE_UNQUANTIZED_CONFIG = FusedMoEQuantConfig()


def biased_moe_quant_config(
    w1_bias: torch.Tensor | None, w2_bias: torch.Tensor | None
) -> FusedMoEQuantConfig:
    """Unquantized weights with biases [e, S * I] and [e, H]."""
    plain = FusedMoEQuantDesc()  # explicit: torch.compile cannot trace default factories
    return FusedMoEQuantConfig(
        a1=plain, a2=plain, w1=FusedMoEQuantDesc(bias=w1_bias), w2=FusedMoEQuantDesc(bias=w2_bias)
    )
