"""``quant_method: fp8`` (DeepSeek and its like), ``mxfp8`` and ``fbgemm_fp8``.

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  one multiplier per block (weight_block_size, usually 128 x 128): fp32, bf16 or
                      e8m0 (scale_fmt ue8m0, whose fp32 form holds powers of two too)
    weight_scale      one number (no block size; Transformers and Mistral call it weight_scale_inv),
                      or [N, 1] (fbgemm_fp8)
    input_scale       one number, where activation_scheme is static (there: activation_scale)

With ``expert_dtype: fp4`` (DeepSeek-V4) the experts alone are MXFP4: weight int8 [N, K / 2] and
scale e8m0 [N, K / 32].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Scheme
from fusedmoe.quantization.dialects.reading import names_of, one_of, sizes_of
from fusedmoe.quantization.dialects.rules import (
    FP8_WEIGHT,
    e8m0_rule,
    make_scheme,
    plain_weight_rule,
    scale_rule,
)
from fusedmoe.quantization.formats.mxfp4 import MXFP4
from fusedmoe.quantization.formats.mxfp8 import MXFP8
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    MXFP8_DYNAMIC,
    PER_ROW,
    PER_TENSOR,
    GroupShape,
    QuantKey,
    fp8_dynamic_group,
)
from fusedmoe.quantization.tensor import QuantFormat

# Stacked experts have bare names: gate_up_proj_scale_inv.
_SCALE_LEAVES = {
    "weight_scale_inv": "weight_scale_inv",
    "scale_inv": "weight_scale_inv",
    "scale": "scale",
    "weight_scale": "weight_scale",
}
_FLOAT_SCALES = ("float", "float32", "fp32")
_INPUT_LEAVES = ("input_scale", "activation_scale")


@dataclass(frozen=True, kw_only=True)
class Fp8Quantization(CheckpointQuantization):
    """``block`` None: one scale per matrix, or one per row (``per_row``)."""

    dialect: str = "fp8"
    block: GroupShape | None = None
    static: bool = False
    ue8m0: bool = False
    per_row: bool = False
    mx: bool = False
    fp4_experts: bool = False
    scale_leaf: str = "weight_scale_inv"
    input_leaf: str = "input_scale"

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> Fp8Quantization:
        method = config["quant_method"]
        if method == "fbgemm_fp8":
            return cls(
                dialect=method,
                per_row=True,
                scale_leaf="weight_scale",
                not_converted=names_of(config, "modules_to_not_convert"),
            )
        sizes = sizes_of(config, "weight_block_size", 2)
        mx = method == "mxfp8" or sizes == (1, 32)
        one_of(config, "fmt", None, "e4m3", "float8_e4m3fn")
        static = one_of(config, "activation_scheme", None, "dynamic", "static") == "static"
        if static and (sizes or mx):
            what = "mxfp8" if mx else f"weight_block_size {list(sizes or ())}"
            raise ValueError(f"quantization_config: {what} has dynamic activations, not static")
        default = "weight_scale_inv" if sizes or mx else "weight_scale"
        return cls(
            dialect="mxfp8" if mx else "fp8",
            block=GroupShape(*sizes) if sizes and not mx else None,
            static=static,
            ue8m0=one_of(config, "scale_fmt", None, "ue8m0", *_FLOAT_SCALES) == "ue8m0",
            mx=mx,
            fp4_experts=config.get("expert_dtype") == "fp4",
            scale_leaf=next(
                (_SCALE_LEAVES[leaf] for leaf in _SCALE_LEAVES if leaf in leaves), default
            ),
            input_leaf=next((leaf for leaf in _INPUT_LEAVES if leaf in leaves), _INPUT_LEAVES[0]),
            not_converted=names_of(config, "modules_to_not_convert", "ignored_layers"),
        )

    def converted(self, module: str) -> Scheme:
        if self.fp4_experts and ".experts." in module:
            packed = plain_weight_rule("weight", torch.int8, torch.uint8, values=2)
            return make_scheme(self.dialect, MXFP4, packed, e8m0_rule(self.scale_leaf, 32))
        if self.mx:
            scale = e8m0_rule(self.scale_leaf, 32)
            return make_scheme(self.dialect, MXFP8, FP8_WEIGHT, scale, activation=MXFP8_DYNAMIC)
        group = self.block or (PER_ROW if self.per_row else PER_TENSOR)
        return make_scheme(
            self.dialect,
            QuantFormat(element="e4m3", group=group),
            FP8_WEIGHT,
            scale_rule(self.scale_leaf, group, torch.float32),
            activation=self._activation(),
            input_scale=self.input_leaf,
            ignored=() if self.static else (*_INPUT_LEAVES, "input_scale_ub"),
        )

    def _activation(self) -> QuantKey:
        if self.block is not None:
            return fp8_dynamic_group(self.block.col, "e8m0" if self.ue8m0 else "float")
        if self.per_row:
            return FP8_DYNAMIC_TOKEN
        return FP8_STATIC_TENSOR if self.static else FP8_DYNAMIC_TENSOR
