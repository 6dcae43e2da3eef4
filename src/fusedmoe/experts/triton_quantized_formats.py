"""What the quantized Triton experts can run, as the keys that selection compares."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from fusedmoe.modular_kernel import ExpertsCapabilities, FusedMoEActivationFormat
from fusedmoe.modular_kernel.capabilities import Operand
from fusedmoe.quantization.formats import MXFP6_E2M3, MXFP6_E3M2
from fusedmoe.quantization.formats.keys import (
    ACTIVATION_KEYS,
    FP8_WEIGHTS,
    INTEGER_WEIGHTS,
    WEIGHT_KEYS,
)
from fusedmoe.quantization.keys import (
    ANY,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP8_DYNAMIC,
    PER_ROW,
    GroupShape,
    QuantKey,
    fp8_dynamic_group,
)

_FP8 = torch.float8_e4m3fn
_INT4_WEIGHTS = tuple(key for key in INTEGER_WEIGHTS if key.dtype == "int4" and not key.act_order)
_WHOLE_ROWS = (FP8_DYNAMIC_TENSOR, FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN)
Pairs = frozenset[tuple[QuantKey | None, QuantKey | None]]
PAIRS: Pairs = frozenset(
    {
        *((weight, None) for weight in WEIGHT_KEYS),
        *((weight, rows) for weight in FP8_WEIGHTS for rows in _WHOLE_ROWS),
        *(
            (QuantKey(_FP8, True, GroupShape(ANY, columns)), fp8_dynamic_group(columns, kind))
            for columns in (32, 64, 128)
            for kind in ("float", "e8m0")
        ),
        *((weight, rows) for weight in _INT4_WEIGHTS for rows in _WHOLE_ROWS),
        (QuantKey(torch.int8, True, PER_ROW), INT8_DYNAMIC_TOKEN),
        (QuantKey(torch.int8, True, PER_ROW), INT8_STATIC_TENSOR),
        (QuantKey("mxfp8", True, GroupShape(1, 32), scale_kind="e8m0"), MXFP8_DYNAMIC),
    }
)
"""(weight, activation) that the kernels multiply; None: activations as they come."""


# e4m3 numbers, and those whose scales are.
_E4M3 = frozenset({_FP8, "mxfp8", "nvfp4"})
_E4M3_CAPABILITY = (8, 9)


def unmet_by_units(device: torch.device, *keys: QuantKey | None) -> str | None:
    """Why this GPU cannot read numbers of ``keys``, None where it can (or is no GPU)."""
    e4m3 = next((key for key in keys if key is not None and key.dtype in _E4M3), None)
    if e4m3 is None or device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _E4M3_CAPABILITY:
        return None
    return f"reads e4m3 ({e4m3}) from compute capability {_E4M3_CAPABILITY} on, not {capability}"


def unmet_by_groups(weight_key: QuantKey | None, activation_key: QuantKey | None) -> str | None:
    """Why columns that share a scale do not fit the kernels' steps, None where they do."""
    int4 = weight_key is not None and weight_key.dtype == "int4"
    least = 16 if activation_key is None else 64 if int4 else 32
    for key in (weight_key, activation_key):
        columns = -1 if key is None or key.act_order else key.group_shape.col
        if columns > 0 and (columns < least or columns & (columns - 1)):
            return f"wants groups of a power of two of at least {least} columns, got {columns}"
    return None


def capabilities(rows: FusedMoEActivationFormat) -> ExpertsCapabilities:
    """What the experts can do that multiply these pairs as they are, in rows of this format."""
    return _capabilities(rows, PAIRS)


def emulated_capabilities(rows: FusedMoEActivationFormat) -> ExpertsCapabilities:
    """What the experts can do that round rows to their format and multiply floats."""
    pairs = frozenset(product(WEIGHT_KEYS, ACTIVATION_KEYS))
    can = _capabilities(rows, pairs)
    activations = frozenset[tuple[Operand, QuantKey]](("activations", k) for k in ACTIVATION_KEYS)
    return replace(can, emulated=can.emulated | activations)


def _capabilities(rows: FusedMoEActivationFormat, pairs: Pairs) -> ExpertsCapabilities:
    return ExpertsCapabilities(
        activation_format=rows,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        weight_formats=pairs,
        min_capability=(8, 0),
        requires=("triton",),
        batch_invariant=True,
        # No GPU of compute capability 9 multiplies floats of six bits.
        emulated=frozenset({("weights", MXFP6_E3M2.key), ("weights", MXFP6_E2M3.key)}),
    )
