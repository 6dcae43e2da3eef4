"""What the quantized Triton experts can run, as the keys that selection compares."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from fusedmoe.modular_kernel import ExpertsCapabilities, FusedMoEActivationFormat
from fusedmoe.quantization.formats.keys import (
    ACTIVATION_KEYS,
    INTEGER_WEIGHTS,
    SUPERBLOCK_WEIGHTS,
    TABLE_WEIGHTS,
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
    PER_TENSOR,
    GroupShape,
    QuantKey,
    fp8_dynamic_group,
)

_FP8 = torch.float8_e4m3fn
_FP8_WEIGHTS = (
    QuantKey(_FP8, True, PER_TENSOR),
    QuantKey(_FP8, True, PER_ROW),
    QuantKey(_FP8, True, GroupShape(ANY, ANY)),
)
WEIGHT_ONLY = (
    *_FP8_WEIGHTS,
    QuantKey("int4", True, PER_ROW),
    QuantKey("int4", True, PER_ROW, symmetric=False),
    QuantKey("int4", True, GroupShape(1, ANY)),
    QuantKey("int4", True, GroupShape(1, ANY), symmetric=False),
    QuantKey(torch.int8, True, PER_ROW),
    QuantKey(torch.int8, True, GroupShape(1, ANY)),
    QuantKey(torch.int8, True, GroupShape(1, ANY), symmetric=False),
    QuantKey("mxfp4", True, GroupShape(1, 32), scale_kind="e8m0"),
    QuantKey("mxfp8", True, GroupShape(1, 32), scale_kind="e8m0"),
    QuantKey("nvfp4", True, GroupShape(1, 16), scale_kind="e4m3", second_scale=True),
    *TABLE_WEIGHTS,
    *SUPERBLOCK_WEIGHTS,
    QuantKey("mxfp6_e3m2", True, GroupShape(1, 32), scale_kind="e8m0"),
    QuantKey("mxfp6_e2m3", True, GroupShape(1, 32), scale_kind="e8m0"),
    *(key for key in INTEGER_WEIGHTS if key.act_order),
)
_WHOLE_ROWS = (FP8_DYNAMIC_TENSOR, FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN)
Pairs = frozenset[tuple[QuantKey | None, QuantKey | None]]
PAIRS: Pairs = frozenset(
    {
        *((weight, None) for weight in WEIGHT_ONLY),
        *((weight, rows) for weight in _FP8_WEIGHTS for rows in _WHOLE_ROWS),
        *(
            (QuantKey(_FP8, True, GroupShape(ANY, columns)), fp8_dynamic_group(columns, kind))
            for columns in (32, 64, 128)
            for kind in ("float", "e8m0")
        ),
        (QuantKey(torch.int8, True, PER_ROW), INT8_DYNAMIC_TOKEN),
        (QuantKey(torch.int8, True, PER_ROW), INT8_STATIC_TENSOR),
        (QuantKey("mxfp8", True, GroupShape(1, 32), scale_kind="e8m0"), MXFP8_DYNAMIC),
    }
)
"""(weight, activation) that the kernels read; None: activations as they come."""


def unmet_by_groups(weight_key: QuantKey | None, activation_key: QuantKey | None) -> str | None:
    """Why columns that share a scale do not fit the kernels' steps, None where they do."""
    least = 16 if activation_key is None else 32
    for key in (weight_key, activation_key):
        columns = -1 if key is None or key.act_order else key.group_shape.col
        if columns > 0 and (columns < least or columns & (columns - 1)):
            return f"wants groups of a power of two of at least {least} columns, got {columns}"
    return None


def capabilities(rows: FusedMoEActivationFormat) -> ExpertsCapabilities:
    """Of the experts that multiply these pairs as they are, for rows in one of the two formats."""
    return _capabilities(rows, PAIRS)


def emulated_capabilities(rows: FusedMoEActivationFormat) -> ExpertsCapabilities:
    """Of the experts that round rows to their format and multiply floats, likewise."""
    pairs = frozenset(product(WEIGHT_ONLY, ACTIVATION_KEYS))
    return replace(
        _capabilities(rows, pairs),
        emulated=frozenset(("activations", key) for key in ACTIVATION_KEYS),
    )


def _capabilities(rows: FusedMoEActivationFormat, pairs: Pairs) -> ExpertsCapabilities:
    batched = rows is FusedMoEActivationFormat.BatchedExperts
    return ExpertsCapabilities(
        activation_format=rows,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        # One scale for all rows would count the rows past each expert's number.
        weight_formats=frozenset(
            pair for pair in pairs if not (batched and pair[1] == FP8_DYNAMIC_TENSOR)
        ),
        min_capability=(8, 9),
        requires=("triton",),
        batch_invariant=True,
    )
