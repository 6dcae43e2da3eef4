"""``quant_method: auto-round``: GPTQ's or AWQ's packing, as ``packing_format`` says.

``extra_config`` has settings of single layers, by name or by a regular expression that is searched
for; 16 bits there mean that a layer is not quantized. Other kinds of numbers than integers
(``data_type``) and rounded activations (``act_bits``) are published with other packings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fusedmoe.quantization.dialects.awq import AwqQuantization
from fusedmoe.quantization.dialects.base import CheckpointQuantization, Leaves
from fusedmoe.quantization.dialects.gptq import GptqQuantization
from fusedmoe.quantization.dialects.reading import (
    Config,
    flag,
    group_size_of,
    integer,
    one_of,
    section,
)

_UNQUANTIZED_BITS = 16
_KINDS = (None, "int", "int_sym", "int_asym", "int_asym_dq", "int_sym_gptq", "int_asym_float_zp")
_SETTINGS = ("bits", "group_size", "sym")
_OF_EXPRESSIONS = set("*+?^$()[]{}|\\")


class AutoRound:
    """What reads the settings; it gives one of those two."""

    @staticmethod
    def read(config: dict[str, Any], leaves: Leaves) -> CheckpointQuantization:
        packing = str(config.get("packing_format", "auto_round:auto_gptq")).rpartition(":")[2]
        _check_integers(config)
        common = {
            "bits": integer(config, "bits"),
            "group_size": group_size_of(config),
            "sym": flag(config, "sym", True),
        }
        layers: dict[str, dict[str, Any] | None] = {}
        for name in section(config, "extra_config"):
            own = section(section(config, "extra_config"), name)
            _check_integers(own)
            floats = integer(own, "bits", common["bits"]) >= _UNQUANTIZED_BITS
            layers[_as_listed(name)] = None if floats else _settings(own)
        if packing in ("auto_awq", "awq"):
            return AwqQuantization.read(_of_awq(common, layers), leaves)
        if packing not in ("auto_gptq", "gptq"):
            raise ValueError(
                f"quantization_config: unknown packing_format {packing!r} of auto-round"
            )
        return replace(GptqQuantization.read(common, leaves), layers=layers)


def _check_integers(settings: Config) -> None:
    """ValueError where numbers are no integers, or activations are rounded too."""
    one_of(settings, "data_type", *_KINDS)
    if integer(settings, "act_bits", _UNQUANTIZED_BITS) < _UNQUANTIZED_BITS:
        raise ValueError(
            f"quantization_config: activations of {settings['act_bits']} bits are not known with "
            "auto-round's packing"
        )


def _settings(own: Config) -> dict[str, Any]:
    return {key: own[key] for key in _SETTINGS if own.get(key) is not None}


def _as_listed(name: str) -> str:
    """The name as ``LayerNames`` reads it, which matches expressions from the start on."""
    return f"re:.*(?:{name})" if _OF_EXPRESSIONS.intersection(name) else name


def _of_awq(common: dict[str, Any], layers: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """AWQ has settings for all layers, and names of those that are left alone."""
    for name, own in layers.items():
        for key, value in (own or {}).items():
            if value != common[key]:
                raise ValueError(
                    f"quantization_config: {name} has {key} {value!r}, but AWQ's packing has one "
                    f"for all layers, {common[key]!r}"
                )
    return {
        "bits": common["bits"],
        "group_size": common["group_size"],
        "zero_point": not common["sym"],
        "modules_to_not_convert": [name for name, own in layers.items() if own is None],
    }
