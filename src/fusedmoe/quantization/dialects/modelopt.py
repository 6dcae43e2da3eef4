"""``quant_method: modelopt`` (NVIDIA Model Optimizer), by ``quant_algo``.

    FP8                       weight e4m3 [N, K], weight_scale [], input_scale []
    FP8_PER_CHANNEL_PER_TOKEN weight_scale [N]
    FP8_PB_WO                 weight_scale per 128 x 128, perhaps as [N / 128, 1, K / 128, 1]
    NVFP4                     weight uint8 [N, K / 2], weight_scale e4m3 [N, K / 16], weight_scale_2
                              and input_scale [], multipliers
    MXFP8                     weight e4m3, weight_scale uint8 (e8m0) [N, K / 32]

The same settings stand in ``hf_quant_config.json`` under "quantization".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Scheme
from fusedmoe.quantization.dialects.reading import integer, names_of, section
from fusedmoe.quantization.dialects.rules import (
    FP8_WEIGHT,
    e4m3_scale_rule,
    e8m0_rule,
    make_scheme,
    plain_weight_rule,
    scalar_rule,
    scale_rule,
)
from fusedmoe.quantization.formats.mxfp8 import MXFP8
from fusedmoe.quantization.formats.nvfp4 import NVFP4
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    PER_ROW,
    PER_TENSOR,
    GroupShape,
    QuantKey,
)
from fusedmoe.quantization.tensor import QuantFormat


@dataclass(frozen=True, kw_only=True)
class ModelOptQuantization(CheckpointQuantization):
    """``layers`` are algorithms (MIXED_PRECISION)."""

    dialect: str = "modelopt"
    algorithm: str
    input_scales: bool = True

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> ModelOptQuantization:
        config = section(config, "quantization") or config
        algorithm = str(config.get("quant_algo")).upper()
        layers, stored = {}, section(config, "quantized_layers")
        for name in stored:
            settings = section(stored, name)
            layers[name] = str(settings.get("quant_algo")).upper()
            if layers[name] == "NVFP4":
                _check_groups(settings)
        for name in set(layers.values()) if algorithm == "MIXED_PRECISION" else {algorithm}:
            if name not in _SCHEMES:
                raise ValueError(
                    f"quantization_config: unknown scheme: quant_algo {name!r}; known: "
                    f"{', '.join(_SCHEMES)}"
                )
        if algorithm == "NVFP4":
            _check_groups(config)
        return cls(
            algorithm=algorithm,
            layers=layers,
            not_converted=names_of(config, "exclude_modules", "ignore"),
            input_scales=not leaves or "input_scale" in leaves,
        )

    def converted(self, module: str) -> Scheme | None:
        if self.algorithm != "MIXED_PRECISION":
            return _SCHEMES[self.algorithm](self.input_scales)
        name = self.layer_names.first(module)
        return None if name is None else _SCHEMES[self.layers[name]](self.input_scales)


def _check_groups(settings: dict[str, Any]) -> None:
    if integer(settings, "group_size", 16) != 16:
        raise ValueError(
            f"quantization_config: NVFP4 has groups of 16, not {settings['group_size']}"
        )


def _fp8(name: str, group: GroupShape, activation: QuantKey | None) -> Scheme:
    return make_scheme(
        f"modelopt {name}",
        QuantFormat(element="e4m3", group=group),
        FP8_WEIGHT,
        scale_rule("weight_scale", group, torch.float32),
        activation=activation,
        ignored=("input_scale",),
    )


def _fp8_tensor(static: bool) -> Scheme:
    return _fp8("FP8", PER_TENSOR, FP8_STATIC_TENSOR if static else FP8_DYNAMIC_TENSOR)


def _fp8_channel(static: bool) -> Scheme:
    return _fp8("FP8_PER_CHANNEL_PER_TOKEN", PER_ROW, FP8_DYNAMIC_TOKEN)


def _fp8_block(static: bool) -> Scheme:
    return _fp8("FP8_PB_WO", GroupShape(128, 128), None)


def _nvfp4(static: bool) -> Scheme:
    return make_scheme(
        "modelopt NVFP4",
        NVFP4,
        plain_weight_rule("weight", torch.uint8, values=2),
        e4m3_scale_rule("weight_scale", 16),
        scalar_rule("weight_scale_2", "weight_scale_2"),
        # Activations get scales of their own as they come.
        scalar_rule("input_scale", "", optional=True),
        activation=NVFP4_DYNAMIC if static else None,
    )


def _mxfp8(static: bool) -> Scheme:
    return make_scheme(
        "modelopt MXFP8",
        MXFP8,
        FP8_WEIGHT,
        e8m0_rule("weight_scale", 32),
        activation=MXFP8_DYNAMIC,
        ignored=("input_scale",),
    )


_SCHEMES = {
    "FP8": _fp8_tensor,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_channel,
    "FP8_PB_WO": _fp8_block,
    "NVFP4": _nvfp4,
    "MXFP8": _mxfp8,
}
