"""FusedMoEQuantConfig for each of the usual schemes, under the names of the API reference.

All tensors are in the canonical layout (``quantization/tensor.py``): scales per tensor [e, S], per
channel [e, N, 1], per group [e, N, K / g], per block [e, S * ceil(N / S / bn), ceil(K / bk)]; zero
points as scales; biases [e, N]; ``a*_scale`` fp32 [1]. Weights named w1 are gate and up, those
named w2 down; e local experts, S shards of w1 (gate, up; 1 for w2), N rows, K columns. All raise
ValueError for contradictions and missing scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.desc import QuantDtype

_FP8, _INT8 = torch.float8_e4m3fn, torch.int8
_make = FusedMoEQuantConfig.make


def fp8_w8a8_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    per_act_token_quant: bool = False,
    per_out_ch_quant: bool = False,
    block_shape: Sequence[int] | None = None,
    a1_gscale: torch.Tensor | None = None,
    a2_gscale: torch.Tensor | None = None,
    g1_alphas: torch.Tensor | None = None,
    g2_alphas: torch.Tensor | None = None,
) -> FusedMoEQuantConfig:
    """fp8 weights and activations; without ``a*_scale`` the latter are quantized as they come."""
    return _make(
        _FP8,
        per_act_token_quant,
        per_out_ch_quant,
        block_shape,
        w1_scale,
        w2_scale,
        a1_scale,
        a2_scale,
        g1_alphas=g1_alphas,
        g2_alphas=g2_alphas,
        a1_gscale=a1_gscale,
        a2_gscale=a2_gscale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
    )


def fp8_w8a16_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    block_shape: Sequence[int] | None = None,
    *,
    per_out_ch_quant: bool = False,
) -> FusedMoEQuantConfig:
    """fp8 weights, activations as they are."""
    return _make(None, False, per_out_ch_quant, block_shape, w1_scale, w2_scale, weight_dtype=_FP8)


def int8_w8a8_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    per_act_token_quant: bool = False,
) -> FusedMoEQuantConfig:
    """int8 weights with a scale per output channel, int8 activations per token or tensor."""
    return _make(_INT8, per_act_token_quant, True, None, w1_scale, w2_scale, a1_scale, a2_scale)


def int8_w8a16_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w1_zp: torch.Tensor | None = None,
    w2_zp: torch.Tensor | None = None,
    block_shape: Sequence[int] | None = None,
) -> FusedMoEQuantConfig:
    """int8 weights, scales per output channel or, with ``block_shape`` (0, g), per group."""
    return _integers(_INT8, w1_scale, w2_scale, w1_zp, w2_zp, block_shape)


def int4_w4a16_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w1_zp: torch.Tensor | None = None,
    w2_zp: torch.Tensor | None = None,
    block_shape: Sequence[int] | None = None,
) -> FusedMoEQuantConfig:
    """int4 weights, scales per output channel or, with ``block_shape`` (0, g), per group."""
    return _integers("int4", w1_scale, w2_scale, w1_zp, w2_zp, block_shape)


def gptq_marlin_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    weight_bits: int,
    group_size: int,
    w1_zp: torch.Tensor | None = None,
    w2_zp: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> FusedMoEQuantConfig:
    """int4 or int8 weights by their bits; ``group_size`` -1 is a scale per output channel."""
    if weight_bits not in (4, 8):
        raise ValueError(f"weight_bits must be 4 or 8, got {weight_bits}")
    dtype: QuantDtype = "int4" if weight_bits == 4 else _INT8
    blocks = None if group_size == -1 else (0, group_size)
    return _integers(dtype, w1_scale, w2_scale, w1_zp, w2_zp, blocks, w1_bias, w2_bias)


def int4_w4afp8_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    g1_alphas: torch.Tensor,
    g2_alphas: torch.Tensor,
    per_act_token_quant: bool = False,
    per_out_ch_quant: bool = False,
    block_shape: Sequence[int] | None = None,
    *,
    group_size: int = 128,
) -> FusedMoEQuantConfig:
    """int4 weights with group scales times a scale per channel, fp8 activations.

    ``w*_scale`` [e, N, K / g] in any float, ``g*_alphas`` [e, N, 1] or [e, N]; their products are
    what the config holds, in fp32. Groups are those of ``block_shape``, else of ``group_size``.
    """
    columns = group_size if block_shape is None else block_shape[1]
    config = _make(
        _FP8,
        block_shape=(0, columns),
        w1_scale=w1_scale.float() * g1_alphas.float().reshape(*g1_alphas.shape[:2], 1),
        w2_scale=w2_scale.float() * g2_alphas.float().reshape(*g2_alphas.shape[:2], 1),
        weight_dtype="int4",
    )
    activation = _make(
        _FP8, per_act_token_quant, per_out_ch_quant, None, config.w1_scale, config.w2_scale
    ).a1
    return replace(config, a1=activation, a2=activation)


def mxfp4_w4a16_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> FusedMoEQuantConfig:
    """MXFP4 weights, activations as they are."""
    return ocp_mx_moe_quant_config(
        None, w1_scale, w2_scale, "mxfp4", w1_bias=w1_bias, w2_bias=w2_bias
    )


def mxfp4_mxfp8_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    block_shape: Sequence[int] | None = None,
) -> FusedMoEQuantConfig:
    """MXFP4 weights, MXFP8 activations (whose scales always come from their values)."""
    return ocp_mx_moe_quant_config(
        "mxfp8", w1_scale, w2_scale, "mxfp4", a1_scale, a2_scale, w1_bias, w2_bias, block_shape
    )


def mxfp4_w4a8_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    block_shape: Sequence[int] | None = None,
) -> FusedMoEQuantConfig:
    """MXFP4 weights, fp8 activations with one scale."""
    return ocp_mx_moe_quant_config(
        _FP8, w1_scale, w2_scale, "mxfp4", a1_scale, a2_scale, w1_bias, w2_bias, block_shape
    )


def mxfp4_moe_quant_config(
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> FusedMoEQuantConfig:
    """MXFP4 weights and activations."""
    return ocp_mx_moe_quant_config("mxfp4", w1_scale, w2_scale, w1_bias=w1_bias, w2_bias=w2_bias)


def ocp_mx_moe_quant_config(
    quant_dtype: QuantDtype | None,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    weight_dtype: str | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    block_shape: Sequence[int] | None = None,
) -> FusedMoEQuantConfig:
    """MX weights (``weight_dtype``, None: as the activations) and MX, fp8 or plain activations."""
    return _make(
        quant_dtype,
        False,
        False,
        block_shape,
        w1_scale,
        w2_scale,
        a1_scale,
        a2_scale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
        weight_dtype=weight_dtype,
    )


def nvfp4_moe_quant_config(
    g1_alphas: torch.Tensor,
    g2_alphas: torch.Tensor,
    a1_gscale: torch.Tensor,
    a2_gscale: torch.Tensor,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> FusedMoEQuantConfig:
    """NVFP4 weights and activations.

    ``a*_gscale`` [1] or [e] are inverses of the activations' second scales (the least is used),
    ``g*_alphas`` [e] or [e, S] the weights' second scales times the activations'.
    """
    return _make(
        "nvfp4",
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        g1_alphas=g1_alphas,
        g2_alphas=g2_alphas,
        a1_gscale=a1_gscale,
        a2_gscale=a2_gscale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
    )


def nvfp4_w4a16_moe_quant_config(
    g1_alphas: torch.Tensor, g2_alphas: torch.Tensor, w1_scale: torch.Tensor, w2_scale: torch.Tensor
) -> FusedMoEQuantConfig:
    """NVFP4 weights with second scales ``g*_alphas`` [e] or [e, S]; activations as they are."""
    return _make(
        None,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        g1_alphas=g1_alphas,
        g2_alphas=g2_alphas,
        weight_dtype="nvfp4",
    )


def _integers(
    dtype: QuantDtype,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w1_zp: torch.Tensor | None,
    w2_zp: torch.Tensor | None,
    block_shape: Sequence[int] | None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> FusedMoEQuantConfig:
    return _make(
        None,
        False,
        block_shape is None,
        block_shape,
        w1_scale,
        w2_scale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
        w1_zp=w1_zp,
        w2_zp=w2_zp,
        weight_dtype=dtype,
    )
