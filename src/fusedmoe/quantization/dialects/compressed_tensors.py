"""``quant_method: compressed-tensors`` (LLM Compressor): one scheme per group of layers.

integers            see compressed_tensors_integers.py
fp8                 weight e4m3 [N, K], weight_scale [1], [N, 1] or blocks, input_scale [1]
nvfp4               weight_packed uint8 [N, K / 2], weight_scale e4m3 [N, K / 16],
                    weight_global_scale and input_global_scale [1], both INVERSES
mxfp4, mxfp6 (e2m3), mxfp8   weight_packed or weight, weight_scale uint8 (e8m0) [N, K / 32]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.quantization.dialects.base import (
    CheckpointQuantization,
    Leaves,
    Scheme,
)
from fusedmoe.quantization.dialects.compressed_tensors_integers import (
    DIALECT,
    IGNORED,
    integer_scheme,
)
from fusedmoe.quantization.dialects.expressions import matches
from fusedmoe.quantization.dialects.patterns import is_listed
from fusedmoe.quantization.dialects.reading import (
    flag,
    group_size_of,
    integer,
    names_of,
    one_of,
    section,
    sizes_of,
)
from fusedmoe.quantization.dialects.rules import (
    BIAS,
    e4m3_scale_rule,
    e8m0_rule,
    plain_weight_rule,
    scalar_rule,
    scale_rule,
)
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    MXFP4_DYNAMIC,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    PER_ROW,
    PER_TENSOR,
    GroupShape,
    QuantKey,
    fp8_dynamic_group,
)
from fusedmoe.quantization.quant_format import QuantFormat

_LINEAR = ("Linear", "FusedMoE")


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsQuantization(CheckpointQuantization):
    """``groups``: (targets, scheme or None) pairs."""

    dialect: str = DIALECT
    groups: tuple[tuple[tuple[str, ...], Scheme | None], ...]
    not_quantized: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> CompressedTensorsQuantization:
        found = []
        for name, group in section(config, "config_groups").items():
            if not isinstance(group, dict):
                raise ValueError(
                    f"quantization_config: group {name!r} is the preset {group!r}, not an object"
                )
            weights = section(group, "weights")
            scheme = None
            if weights:
                packing = group.get("format") or config.get("format")
                inputs = section(group, "input_activations")
                scheme = scheme_of(weights, inputs, packing, leaves)
            found.append((names_of(group, "targets"), scheme))
        if not found:
            raise ValueError("quantization_config: compressed-tensors without config_groups")
        return cls(groups=tuple(found), not_quantized=names_of(config, "ignore"))

    def scheme(self, module: str) -> Scheme | None:
        """The group that names ``module``, by itself before by pattern before by class."""
        if is_listed(module, self.not_quantized):
            return None
        ranked = [
            (min(rank), scheme)
            for targets, scheme in self.groups
            if (rank := [r for target in targets if (r := _rank(target, module)) is not None])
        ]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _rank(target: str, module: str) -> int | None:
    """How closely a target means ``module``: 0 by name, 1 by pattern, 2 by class; None: not."""
    if target.startswith("re:"):
        return 1 if matches(target[3:], module) else None
    if target in _LINEAR:
        return 2
    return 0 if is_listed(module, (target,)) else None


def scheme_of(
    weights: dict[str, Any], inputs: dict[str, Any], packing: Any, leaves: Leaves
) -> Scheme:
    """The scheme of one group's ``weights`` and ``input_activations``.

    Raises ValueError, naming what it says, for a combination that is not known.
    """
    kind = one_of(weights, "type", "int", "float")
    bits = integer(weights, "num_bits", 8)
    if flag(weights, "dynamic", False):
        raise ValueError("quantization_config: weights cannot be dynamic")
    if kind == "int":
        return integer_scheme(weights, inputs, bits, _group(weights), packing, leaves)
    group = _group(weights)
    if bits == 8 and not _is_mx(weights):
        return _fp8(group, inputs)
    if bits == 4 and group == (1, 16):
        return _nvfp4(inputs)
    element = {4: "e2m1", 6: "e2m3", 8: "e4m3"}.get(bits)
    if element is None or group != (1, 32):
        raise ValueError(
            f"quantization_config: unknown scheme: {bits}-bit floats in groups of "
            f"{group.row} x {group.col}"
        )
    return _mx(element, inputs)


def _is_mx(weights: dict[str, Any]) -> bool:
    return weights.get("group_size") == 32 and "uint8" in str(weights.get("scale_dtype"))


def _group(weights: dict[str, Any]) -> GroupShape:
    strategy = one_of(
        weights, "strategy", None, "tensor", "channel", "group", "block", "tensor_group"
    )
    if strategy == "block":
        sizes = sizes_of(weights, "block_structure", 2)
        if sizes is None:
            raise ValueError("quantization_config: strategy block without block_structure")
        return GroupShape(*sizes)
    if strategy == "tensor":
        return PER_TENSOR
    if strategy == "channel" or (strategy is None and weights.get("group_size") in (None, -1)):
        return PER_ROW if strategy else PER_TENSOR
    return GroupShape(1, group_size_of(weights))


def _fp8(group: GroupShape, inputs: dict[str, Any]) -> Scheme:
    static = bool(inputs) and not inputs.get("dynamic", False)
    rules = [
        plain_weight_rule("weight", torch.float8_e4m3fn),
        scale_rule("weight_scale", group, torch.float32),
        BIAS,
    ]
    if static:
        rules.append(scalar_rule("input_scale", "input_scale"))
    return Scheme(
        dialect=DIALECT,
        format=QuantFormat(element="e4m3", group=group),
        activation=_fp8_activation(inputs, static),
        rules=tuple(rules),
        ignored=IGNORED,
    )


def _fp8_activation(inputs: dict[str, Any], static: bool) -> QuantKey | None:
    if not inputs:
        return None
    group = _group(inputs) if inputs.get("strategy") != "token" else PER_ROW
    if group.col > 0:
        return fp8_dynamic_group(group.col)
    if static and group != PER_TENSOR:
        raise ValueError("quantization_config: static activation scales must be per tensor")
    if group == PER_TENSOR:
        return FP8_STATIC_TENSOR if static else FP8_DYNAMIC_TENSOR
    return FP8_DYNAMIC_TOKEN


def _nvfp4(inputs: dict[str, Any]) -> Scheme:
    return Scheme(
        dialect=DIALECT,
        format=QuantFormat(
            element="e2m1",
            group=GroupShape(1, 16),
            scale_dtype=torch.float8_e4m3fn,
            second_scale=True,
        ),
        activation=NVFP4_DYNAMIC if inputs else None,
        rules=(
            plain_weight_rule("weight_packed", torch.uint8, values=2),
            e4m3_scale_rule("weight_scale", 16),
            scalar_rule("weight_global_scale", "weight_scale_2", inverse=True),
            # Activations get scales of their own as they come.
            scalar_rule("input_global_scale", "", inverse=True, optional=True),
            BIAS,
        ),
        ignored=IGNORED,
    )


def _mx(element: str, inputs: dict[str, Any]) -> Scheme:
    format_ = QuantFormat(element=element, group=GroupShape(1, 32), scale_dtype=torch.uint8)
    weight = (
        plain_weight_rule("weight", torch.float8_e4m3fn)
        if element == "e4m3"
        else plain_weight_rule(
            "weight_packed", torch.uint8, stored=format_.type.stored, values=format_.values
        )
    )
    activation: QuantKey | None = None
    if inputs:
        bits, columns = integer(inputs, "num_bits", 8), inputs.get("group_size")
        activation = {4: MXFP4_DYNAMIC, 8: MXFP8_DYNAMIC}.get(bits)
        if columns != 32:
            activation = fp8_dynamic_group(columns) if columns else FP8_DYNAMIC_TOKEN
    return Scheme(
        dialect=DIALECT,
        format=format_,
        activation=activation,
        rules=(weight, e8m0_rule("weight_scale", 32), BIAS),
        ignored=IGNORED,
    )
