"""Names for how a tensor is quantized, as selection compares them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

ANY = 0
"""In a capability's ``GroupShape``: every size from 1 on (but not the whole extent, -1)."""


class GroupShape(NamedTuple):
    """How many (rows, columns) share one scale; -1 is the whole extent.

    Rows of a weight are output features, rows of an activation are tokens; columns are what the
    product sums over. (1, -1) is a scale per row: per channel of a weight, per token of an
    activation.
    """

    row: int
    col: int

    def accepts(self, other: GroupShape) -> bool:
        """Whether ``other`` is this shape, ``ANY`` standing for every number."""
        return all(a == b or (a == ANY and b > 0) for a, b in zip(self, other, strict=True))


PER_TENSOR = GroupShape(-1, -1)
PER_ROW = PER_TOKEN = PER_CHANNEL = GroupShape(1, -1)

ScaleKind = Literal["float", "e8m0", "e4m3"]
"""What scales are: floating-point numbers, powers of two, or fp8 numbers."""


@dataclass(frozen=True)
class QuantKey:
    """One quantized operand: element type, whether scales are stored, and what shares a scale.

    ``dtype`` is a torch dtype or one of the names that torch lacks: "int4", "mxfp4", "mxfp8",
    "mxfp6_e3m2", "mxfp6_e2m3", "nvfp4", ... ``static`` False computes scales from the values, each
    time. ``second_scale``: a number per tensor multiplies the scales. ``act_order``: columns belong
    to groups by a table instead of by position.
    """

    dtype: torch.dtype | str
    static: bool
    group_shape: GroupShape
    symmetric: bool = True
    scale_kind: ScaleKind = "float"
    second_scale: bool = False
    act_order: bool = False

    def accepts(self, other: QuantKey | None) -> bool:
        """Whether ``other`` is this key, ``ANY`` in the group shape standing for every number."""
        return (
            other is not None
            and self.dtype == other.dtype
            and self.group_shape.accepts(other.group_shape)
            and replace(self, group_shape=other.group_shape) == other
        )

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        shared = {PER_TENSOR: "per tensor", PER_ROW: "per row"}.get(
            self.group_shape, f"per {self.group_shape.row}x{self.group_shape.col}"
        )
        words = [name, shared, "static" if self.static else "dynamic"]
        if not self.symmetric:
            words.append("with zero points")
        if self.scale_kind != "float":
            words.append(f"{self.scale_kind} scales")
        if self.act_order:
            words.append("act-order")
        return " ".join(words)


def accepts(pattern: QuantKey | None, key: QuantKey | None) -> bool:
    """``pattern.accepts(key)``, None (unquantized) accepting None alone."""
    return key is None if pattern is None else pattern.accepts(key)


_FP8 = torch.float8_e4m3fn

# Of activations. ``*_UE8M0``: scales rounded up to powers of two.
FP8_DYNAMIC_TENSOR = QuantKey(_FP8, False, PER_TENSOR)
FP8_STATIC_TENSOR = QuantKey(_FP8, True, PER_TENSOR)
FP8_DYNAMIC_TOKEN = QuantKey(_FP8, False, PER_TOKEN)
FP8_DYNAMIC_128 = QuantKey(_FP8, False, GroupShape(1, 128))
FP8_DYNAMIC_128_UE8M0 = QuantKey(_FP8, False, GroupShape(1, 128), scale_kind="e8m0")
INT8_DYNAMIC_TOKEN = QuantKey(torch.int8, False, PER_TOKEN)
INT8_STATIC_TENSOR = QuantKey(torch.int8, True, PER_TENSOR)
MXFP4_DYNAMIC = QuantKey("mxfp4", False, GroupShape(1, 32), scale_kind="e8m0")
MXFP8_DYNAMIC = QuantKey("mxfp8", False, GroupShape(1, 32), scale_kind="e8m0")
MXFP6_E3M2_DYNAMIC = QuantKey("mxfp6_e3m2", False, GroupShape(1, 32), scale_kind="e8m0")
MXFP6_E2M3_DYNAMIC = QuantKey("mxfp6_e2m3", False, GroupShape(1, 32), scale_kind="e8m0")
NVFP4_DYNAMIC = QuantKey("nvfp4", False, GroupShape(1, 16), scale_kind="e4m3", second_scale=True)
NVFP4_STATIC = replace(NVFP4_DYNAMIC, static=True)  # only its second scale is


def fp8_dynamic_group(columns: int, scale_kind: ScaleKind = "float") -> QuantKey:
    """fp8 activations with a scale per token and ``columns`` columns."""
    return QuantKey(_FP8, False, GroupShape(1, columns), scale_kind=scale_kind)
