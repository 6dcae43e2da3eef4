"""``quant_method: compressed-tensors`` (LLM Compressor): one scheme per group of layers.

integers            see compressed_tensors_integers.py
fp8                 weight e4m3 [N, K], weight_scale [1], [N, 1] or blocks, input_scale [1]
nvfp4               weight_packed uint8 [N, K / 2], weight_scale e4m3 [N, K / 16],
                    weight_global_scale and input_global_scale [1], both INVERSES
mxfp4, mxfp6 (e2m3), mxfp8   weight_packed or weight, weight_scale uint8 (e8m0) [N, K / 32]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves, Scheme
from fusedmoe.quantization.dialects.compressed_tensors_integers import (
    DIALECT,
    IGNORED,
    dynamic_of,
    integer_scheme,
)
from fusedmoe.quantization.dialects.patterns import LayerNames
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
    FP8_WEIGHT,
    e4m3_scale_rule,
    e8m0_rule,
    make_scheme,
    plain_weight_rule,
    scalar_rule,
    scale_rule,
)
from fusedmoe.quantization.formats.nvfp4 import NVFP4
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    PER_ROW,
    PER_TENSOR,
    GroupShape,
    QuantKey,
    fp8_dynamic_group,
)
from fusedmoe.quantization.tensor import QuantFormat

_LINEAR = ("Linear", "FusedMoE")
_PACKINGS = (
    *("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
)


class _Group(NamedTuple):
    """Layers by ``names`` and by ``expressions``, or ``every`` one, stored as ``scheme`` says."""

    names: LayerNames
    expressions: LayerNames
    every: bool
    scheme: Scheme | None

    @classmethod
    def of(cls, targets: Iterable[str], scheme: Scheme | None) -> _Group:
        named = [target for target in targets if target not in _LINEAR]
        expressions = [target for target in named if target.startswith("re:")]
        names = [target for target in named if not target.startswith("re:")]
        every = any(target in _LINEAR for target in targets)
        return cls(LayerNames(names), LayerNames(expressions), every, scheme)

    def rank(self, module: str) -> int | None:
        """How closely it means ``module``: 0 by name, 1 by pattern, 2 by class; None: not."""
        means = (module in self.names, module in self.expressions, self.every)
        return means.index(True) if True in means else None


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsQuantization(CheckpointQuantization):
    dialect: str = DIALECT
    groups: tuple[_Group, ...]

    @classmethod
    def read(cls, config: dict[str, Any], leaves: Leaves) -> CompressedTensorsQuantization:
        _check_whole(config)
        found, groups = [], section(config, "config_groups")
        if len({str(one.get("format")) for one in groups.values() if isinstance(one, dict)}) > 1:
            # With several formats, tensors of these names need not be the experts'.
            leaves = {n: t for n, t in leaves.items() if n not in ("weight", "weight_packed")}
        for name, group in groups.items():
            if not isinstance(group, dict):
                raise ValueError(
                    f"quantization_config: group {name!r} is the preset {group!r}, not an object"
                )
            weights = section(group, "weights")
            if section(group, "output_activations"):
                raise ValueError("quantization_config: rounded outputs are not known")
            scheme = None
            if weights:
                packing = one_of(group, "format", None, *_PACKINGS) or config.get("format")
                inputs = section(group, "input_activations")
                scheme = scheme_of(weights, inputs, packing, leaves)
            found.append(_Group.of(names_of(group, "targets"), scheme))
        if not found:
            raise ValueError("quantization_config: compressed-tensors without config_groups")
        return cls(groups=tuple(found), not_converted=names_of(config, "ignore"))

    def converted(self, module: str) -> Scheme | None:
        """The group that names ``module``, by itself before by pattern before by class."""
        ranked = [
            (rank, group.scheme)
            for group in self.groups
            if (rank := group.rank(module)) is not None
        ]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _check_whole(config: dict[str, Any]) -> None:
    """ValueError for what would change the numbers beside the formats of the weights."""
    if section(section(config, "transform_config"), "config_groups"):
        raise ValueError(
            "quantization_config: rotated activations (transform_config) are not known"
        )
    sparse = section(config, "sparsity_config")
    for settings, *known in ((sparse, None, "dense"), (config, None, *_PACKINGS)):
        one_of(settings, "format", *known)


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
    _check_symmetric(weights)
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
    if strategy == "tensor" or (strategy is None and weights.get("group_size") is None):
        return PER_TENSOR
    return PER_ROW if strategy == "channel" else GroupShape(1, group_size_of(weights))


def _fp8(group: GroupShape, inputs: dict[str, Any]) -> Scheme:
    return make_scheme(
        DIALECT,
        QuantFormat(element="e4m3", group=group),
        FP8_WEIGHT,
        scale_rule("weight_scale", group, torch.float32),
        activation=_activation(inputs),
        ignored=IGNORED,
    )


def _activation(inputs: dict[str, Any]) -> QuantKey | None:
    """What ``input_activations`` say; ValueError for a combination that is not known."""
    if not inputs:
        return None
    one_of(inputs, "type", "float")
    _check_symmetric(inputs)
    bits, dynamic = integer(inputs, "num_bits", 8), dynamic_of(inputs)
    group = PER_ROW if inputs.get("strategy") == "token" else _group(inputs)
    in_groups = {
        (4, 16): NVFP4_DYNAMIC,  # of the second scale, too
        (4, 32): MXFP4_DYNAMIC,
        (6, 32): MXFP6_E2M3_DYNAMIC,
    }.get((bits, group.col))
    if in_groups is not None:
        return in_groups
    if bits != 8 or group.row > 1 or (group.col > 0 and not dynamic):
        raise ValueError(
            f"quantization_config: unknown scheme: {bits}-bit float activations per "
            f"{inputs.get('strategy')} of {inputs.get('group_size')}"
        )
    if group.col > 0:
        return MXFP8_DYNAMIC if _is_mx(inputs) else fp8_dynamic_group(group.col)
    if not dynamic and group != PER_TENSOR:
        raise ValueError(
            "quantization_config: static activation scales must be per tensor, not per "
            f"{inputs.get('strategy')}"
        )
    if group == PER_TENSOR:
        return FP8_DYNAMIC_TENSOR if dynamic else FP8_STATIC_TENSOR
    return FP8_DYNAMIC_TOKEN


def _check_symmetric(settings: dict[str, Any]) -> None:
    if not flag(settings, "symmetric", True):
        raise ValueError("quantization_config: zero points of floats are not known")


def _nvfp4(inputs: dict[str, Any]) -> Scheme:
    return make_scheme(
        DIALECT,
        NVFP4,
        plain_weight_rule("weight_packed", torch.uint8, values=2),
        e4m3_scale_rule("weight_scale", 16),
        scalar_rule("weight_global_scale", "weight_scale_2", inverse=True),
        # Activations get scales of their own as they come.
        scalar_rule("input_global_scale", "", inverse=True, optional=True),
        activation=_activation(inputs),
        ignored=IGNORED,
    )


def _mx(element: str, inputs: dict[str, Any]) -> Scheme:
    format_ = QuantFormat(element=element, group=GroupShape(1, 32), scale_dtype=torch.uint8)
    weight = (
        FP8_WEIGHT
        if element == "e4m3"
        else plain_weight_rule(
            "weight_packed", torch.uint8, stored=format_.type.stored, values=format_.values
        )
    )
    activation = _activation(inputs)
    if activation == fp8_dynamic_group(32):
        activation = MXFP8_DYNAMIC  # older configurations leave the scales' dtype out
    scale = e8m0_rule("weight_scale", 32)
    return make_scheme(DIALECT, format_, weight, scale, activation=activation, ignored=IGNORED)
