"""``quant_method: quark`` (AMD Quark): weight and input settings per layer, by pattern.

fp8_e4m3      weight e4m3 [N, K], weight_scale [] or [N] (per_channel), input_scale []
int8          weight int8 [N, K], weight_scale [] or [N]
fp4           weight uint8 [N, K / 2], weight_scale uint8 (e8m0) [N, K / 32]
fp6_e3m2/e2m3 weight uint8 [N, K * 6 / 8], weight_scale uint8 (e8m0) [N, K / 32]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Scheme
from fusedmoe.quantization.dialects.reading import flag, integer, names_of, one_of, section
from fusedmoe.quantization.dialects.rules import (
    e8m0_rule,
    make_scheme,
    plain_weight_rule,
    repeated_scale_rule,
    scale_rule,
)
from fusedmoe.quantization.formats.mxfp4 import MXFP4
from fusedmoe.quantization.formats.mxfp6 import MXFP6_E2M3, MXFP6_E3M2
from fusedmoe.quantization.formats.mxfp8 import MXFP8
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP6_E3M2_DYNAMIC,
    MXFP8_DYNAMIC,
    PER_ROW,
    PER_TENSOR,
    QuantKey,
)
from fusedmoe.quantization.tensor import QuantFormat

_FORMATS = {"fp4": MXFP4, "fp6_e3m2": MXFP6_E3M2, "fp6_e2m3": MXFP6_E2M3, "fp8_e4m3": MXFP8}
_MX_ACTIVATIONS = {
    "fp4": MXFP4_DYNAMIC,
    "fp6_e3m2": MXFP6_E3M2_DYNAMIC,
    "fp6_e2m3": MXFP6_E2M3_DYNAMIC,
    "fp8_e4m3": MXFP8_DYNAMIC,
}


@dataclass(frozen=True, kw_only=True)
class QuarkQuantization(CheckpointQuantization):
    """``layers`` are schemes (None: floats), ``default`` that of all others."""

    dialect: str = "quark"
    default: Scheme | None

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> QuarkQuantization:
        layers = section(config, "layer_quant_config")
        if section(config, "layer_type_quant_config"):
            raise ValueError("quantization_config: settings by type of layer are not known")
        return cls(
            default=scheme_of(section(config, "global_quant_config")),
            layers={name: scheme_of(section(layers, name)) for name in layers},
            not_converted=names_of(config, "exclude"),
        )

    def converted(self, module: str) -> Scheme | None:
        name = self.layer_names.first(module)
        return self.default if name is None else self.layers[name]


def scheme_of(settings: dict[str, Any]) -> Scheme | None:
    """The scheme of one ``*_quant_config``. Raises ValueError for one that is not known."""
    weight, inputs = section(settings, "weight"), section(settings, "input_tensors")
    if not weight:
        return None
    dtype = one_of(weight, "dtype", "int8", *_FORMATS)
    qscheme = one_of(weight, "qscheme", "per_tensor", "per_channel", "per_group")
    if qscheme == "per_group":
        return _mx(weight, inputs, dtype)
    if dtype not in ("fp8_e4m3", "int8"):
        raise ValueError(f"quantization_config: unknown scheme: {dtype} {qscheme}")
    if qscheme == "per_channel":
        one_of(weight, "ch_axis", None, 0, -2)
    for operand in (weight, inputs):
        if not flag(operand, "symmetric", True):
            raise ValueError(f"quantization_config: zero points of {dtype} are not known")
    group = PER_TENSOR if qscheme == "per_tensor" else PER_ROW
    activation = _activation(inputs, dtype)
    is_fp8 = dtype == "fp8_e4m3"
    scale = scale_rule("weight_scale", group, torch.float32)
    if group == PER_TENSOR and not is_fp8:
        group, scale = PER_ROW, repeated_scale_rule("weight_scale", torch.float32)
    return make_scheme(
        "quark",
        QuantFormat(element="e4m3" if is_fp8 else "int8", group=group),
        plain_weight_rule("weight", torch.float8_e4m3fn if is_fp8 else torch.int8),
        scale,
        activation=activation,
        ignored=("weight_zero_point", "input_zero_point", "input_scale"),
    )


def _activation(inputs: dict[str, Any], dtype: str) -> QuantKey | None:
    if not inputs:
        return None
    one_of(inputs, "dtype", dtype)
    qscheme = one_of(inputs, "qscheme", "per_tensor", "per_channel", "per_token")
    dynamic = flag(inputs, "is_dynamic", False)
    if dtype == "int8":
        if not dynamic or qscheme == "per_tensor":
            raise ValueError(
                "quantization_config: int8 activations must be dynamic, per token, not "
                f"{'dynamic' if dynamic else 'static'}, {qscheme}"
            )
        return INT8_DYNAMIC_TOKEN
    if qscheme != "per_tensor":
        return FP8_DYNAMIC_TOKEN
    return FP8_DYNAMIC_TENSOR if dynamic else FP8_STATIC_TENSOR


def _mx(weight: dict[str, Any], inputs: dict[str, Any], dtype: str) -> Scheme:
    """OCP microscaling formats: groups of 32 with e8m0 scales."""
    one_of(weight, "scale_format", "e8m0")
    columns = integer(weight, "group_size")
    if columns != 32 or dtype not in _FORMATS:
        raise ValueError(f"quantization_config: unknown scheme: {dtype} in groups of {columns}")
    format_ = _FORMATS[dtype]
    stored = (torch.float8_e4m3fn,) if dtype == "fp8_e4m3" else (torch.uint8,)
    activation: QuantKey | None = None
    if inputs:
        kind = one_of(inputs, "dtype", *_MX_ACTIVATIONS)
        grouped = inputs.get("qscheme") == "per_group"
        activation = _MX_ACTIVATIONS[kind] if grouped else _activation(inputs, "fp8_e4m3")
    return make_scheme(
        "quark",
        format_,
        plain_weight_rule("weight", *stored, stored=format_.type.stored, values=format_.values),
        e8m0_rule("weight_scale", 32),
        activation=activation,
    )
