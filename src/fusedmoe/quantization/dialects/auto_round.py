"""``quant_method: auto-round``: GPTQ's or AWQ's packing, as ``packing_format`` says.

``extra_config`` has settings of single layers; 16 bits there mean that a layer is not quantized.
"""

from __future__ import annotations

import re
from typing import Any

from fusedmoe.quantization.dialects.reading import flag, group_size_of, integer, section

_UNQUANTIZED_BITS = 16


def as_gptq_or_awq(config: dict[str, Any]) -> dict[str, Any]:
    """The same settings as one of those two would write them. ValueError for other packings."""
    packing = str(config.get("packing_format", "auto_round:auto_gptq")).rpartition(":")[2]
    symmetric = flag(config, "sym", True)
    common = {"bits": integer(config, "bits"), "group_size": group_size_of(config)}
    layers = {
        name: section(section(config, "extra_config"), name)
        for name in section(config, "extra_config")
    }
    floats = [name for name, own in layers.items() if own.get("bits", 0) >= _UNQUANTIZED_BITS]
    if packing in ("auto_awq", "awq"):
        zeros = {"zero_point": not symmetric, "modules_to_not_convert": floats}
        return {"quant_method": "awq", **common, **zeros}
    if packing not in ("auto_gptq", "gptq"):
        raise ValueError(f"quantization_config: unknown packing_format {packing!r} of auto-round")
    dynamic = {
        re.escape(name) + "$": {
            key: own[key] for key in ("bits", "group_size", "sym") if key in own
        }
        for name, own in layers.items()
        if name not in floats
    }
    return {
        "quant_method": "gptq",
        **common,
        "sym": symmetric,
        "desc_act": False,
        "modules_to_not_convert": floats,
        "dynamic": dynamic,
    }
