"""Dialects: how checkpoints store quantized experts, one file each.

``read_quantization`` is the way in; ``base`` says what a dialect is.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from typing import Any

from fusedmoe.quantization.dialects.base import (
    CheckpointQuantization,
    LayerSchemes,
    Leaves,
    Matrix,
    Rule,
    Scheme,
)

_HOME = {
    "fp8": "fp8:Fp8Quantization",
    "mxfp8": "fp8:Fp8Quantization",
    "fbgemm_fp8": "fp8:Fp8Quantization",
    "compressed-tensors": "compressed_tensors:CompressedTensorsQuantization",
    "gptq": "gptq:GptqQuantization",
    "awq": "awq:AwqQuantization",
    "auto-round": "auto_round:AutoRound",
    "mxfp4": "gpt_oss:GptOssQuantization",
    "modelopt": "modelopt:ModelOptQuantization",
    "modelopt_fp4": "modelopt:ModelOptQuantization",
    "quark": "quark:QuarkQuantization",
    "bitsandbytes": "bitsandbytes:BitsAndBytesQuantization",
}


def read_quantization(config: Any, leaves: Leaves | None = None) -> CheckpointQuantization:
    """What a ``quantization_config`` means: an object of JSON, or Transformers' own record of one.

    ``leaves`` are the dtypes of the expert tensors in the files, by the last part of their names;
    without them the usual ones are assumed. Raises ValueError for a method that is not known.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(f"quantization_config must be an object, got {type(config).__name__}")
    method = config.get("quant_method")
    method = method.value if isinstance(method, Enum) else method
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if method is None:
        inner = config.get("quantization", config)
        method = "modelopt" if isinstance(inner, Mapping) and "quant_algo" in inner else None
    if method == "intel/auto-round":
        method = "auto-round"
    if not isinstance(method, str) or method not in _HOME:
        raise ValueError(
            f"quantization_config: unknown quant_method {method!r}; known: {', '.join(_HOME)}"
        )
    module, _, name = _HOME[method].partition(":")
    dialect = getattr(import_module(f"{__name__}.{module}"), name)
    return dialect.read({**config, "quant_method": method}, leaves or {})


__all__ = [
    "CheckpointQuantization",
    "LayerSchemes",
    "Leaves",
    "Matrix",
    "Rule",
    "Scheme",
    "read_quantization",
]
