"""``quant_method: auto-round``: GPTQ's or AWQ's packing, as ``packing_format`` says.

``extra_config`` has settings of single layers, by name or by a regular expression that is searched
for; 16 bits there mean that a layer is not quantized. Other kinds of numbers than integers
(``data_type``) and rounded activations (``act_bits``) are published with other packings.
"""

from __future__ import annotations

import re
from typing import Any

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


def as_gptq_or_awq(config: dict[str, Any]) -> dict[str, Any]:
    """The same settings as one of those two would write them. ValueError for other packings."""
    packing = str(config.get("packing_format", "auto_round:auto_gptq")).rpartition(":")[2]
    _check_integers(config)
    common = {
        "bits": integer(config, "bits"),
        "group_size": group_size_of(config),
        "sym": flag(config, "sym", True),
    }
    layers: list[tuple[str, dict[str, Any] | None]] = []
    for name in section(config, "extra_config"):
        own = section(section(config, "extra_config"), name)
        _check_integers(own)
        floats = integer(own, "bits", common["bits"]) >= _UNQUANTIZED_BITS
        layers.append((name, None if floats else own))
    if packing in ("auto_awq", "awq"):
        return _awq(common, layers)
    if packing not in ("auto_gptq", "gptq"):
        raise ValueError(f"quantization_config: unknown packing_format {packing!r} of auto-round")
    dynamic = {
        f"{'-' if own is None else '+'}:{_expression(name)}": _settings(own or {})
        for name, own in layers
    }
    return {"quant_method": "gptq", **common, "desc_act": False, "dynamic": dynamic}


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


def _expression(name: str) -> str:
    """What GPTQ's settings match from the start of a name on."""
    if _OF_EXPRESSIONS.intersection(name):
        return f".*(?:{name})"
    return rf"(?:.*\.)?{re.escape(name)}$"


def _awq(common: dict[str, Any], layers: list[tuple[str, dict[str, Any] | None]]) -> dict[str, Any]:
    """AWQ has settings for all layers, and names of those that are left alone."""
    for name, own in layers:
        for key, value in _settings(own or {}).items():
            if value != common[key]:
                raise ValueError(
                    f"quantization_config: {name} has {key} {value!r}, but AWQ's packing has one "
                    f"for all layers, {common[key]!r}"
                )
    floats = [f"re:{_expression(name)}" for name, own in layers if own is None]
    return {
        "quant_method": "awq",
        "bits": common["bits"],
        "group_size": common["group_size"],
        "zero_point": not common["sym"],
        "modules_to_not_convert": floats,
    }
