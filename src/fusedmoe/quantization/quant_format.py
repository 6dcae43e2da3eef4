"""QuantFormat: what the numbers of a quantized tensor mean, and how each kind is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusedmoe.quantization.keys import PER_ROW, PER_TENSOR, GroupShape, QuantKey, ScaleKind


class ElementType(NamedTuple):
    """How numbers of a kind are stored: ``values`` consecutive columns in ``stored`` numbers.

    ``zero`` is what a symmetric format subtracts.
    """

    dtype: torch.dtype
    values: int = 1
    stored: int = 1
    zero: int = 0


ELEMENTS: dict[str, ElementType] = {
    "e4m3": ElementType(torch.float8_e4m3fn),
    "int8": ElementType(torch.int8),
    # One byte holds columns 2c (low nibble) and 2c + 1 (high nibble), unsigned.
    "int4": ElementType(torch.uint8, 2, 1, zero=8),
    "e2m1": ElementType(torch.uint8, 2, 1),
    # Three bytes, little-endian, hold columns 4c to 4c + 3 from the lowest bits on.
    "e3m2": ElementType(torch.uint8, 4, 3),
    "e2m3": ElementType(torch.uint8, 4, 3),
    # Nibbles, packed as int4, that index a table.
    "nf4": ElementType(torch.uint8, 2, 1),
    "iq4_nl": ElementType(torch.uint8, 2, 1),
    # GGUF's superblocks, which carry their scales.
    "q4_k": ElementType(torch.uint8, 256, 144),
    "q5_k": ElementType(torch.uint8, 256, 176),
    "q6_k": ElementType(torch.uint8, 256, 212),
}
"""By name. All floats are OCP's: sign, exponent, mantissa."""

_MX_NAMES = {"e2m1": "mxfp4", "e4m3": "mxfp8", "e3m2": "mxfp6_e3m2", "e2m3": "mxfp6_e2m3"}
_ELEMENT_OF: dict[torch.dtype | str, str] = {
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "int8",
    "int4": "int4",
    "nvfp4": "e2m1",
    **{name: element for element, name in _MX_NAMES.items()},
}
_SCALE_KINDS: dict[torch.dtype | None, ScaleKind] = {
    torch.uint8: "e8m0",
    torch.float8_e4m3fn: "e4m3",
}


@dataclass(frozen=True, kw_only=True)
class QuantFormat:
    """What the numbers of a ``QuantizedTensor`` mean.

    ``element`` is a key of ``ELEMENTS``. ``group`` counts the (rows, columns) of one shard that
    share a scale. ``scale_dtype``: fp32, bf16 or fp16; ``torch.uint8`` for e8m0 exponents
    (2^(s - 127)); ``torch.float8_e4m3fn``; None for elements that carry their scales.
    """

    element: str
    group: GroupShape
    scale_dtype: torch.dtype | None = torch.float32
    symmetric: bool = True
    second_scale: bool = False
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise ValueError(f"unknown element type {self.element!r}; known: {', '.join(ELEMENTS)}")
        row, col = self.group
        if row == 0 or col == 0 or min(row, col) < -1 or (row == -1 and col != -1):
            raise ValueError(f"a group of {row} rows and {col} columns is not one we know")
        if col > 0 and col % self.values and row == 1:
            raise ValueError(
                f"groups of {col} columns cut the {self.values} columns that {self.element} packs"
            )
        if self.act_order and (row != 1 or col < 1):
            raise ValueError(f"act-order needs groups of columns, not {row} x {col}")

    @classmethod
    def of(
        cls,
        dtype: torch.dtype | str,
        group: GroupShape,
        scale_dtype: torch.dtype,
        *,
        symmetric: bool = True,
        act_order: bool = False,
    ) -> QuantFormat:
        """The format whose ``key_dtype`` is ``dtype``; ValueError where there is none."""
        if dtype not in _ELEMENT_OF:
            known = ", ".join(str(name) for name in _ELEMENT_OF)
            raise ValueError(f"unknown weight dtype {dtype}; known: {known}")
        fmt = cls(
            element=_ELEMENT_OF[dtype],
            group=group,
            scale_dtype=scale_dtype,
            symmetric=symmetric,
            second_scale=dtype == "nvfp4",
            act_order=act_order,
        )
        if fmt.key_dtype != dtype:
            raise ValueError(
                f"{dtype} weights have no scales in {scale_dtype} per {group.row} x {group.col}"
            )
        return fmt

    @property
    def type(self) -> ElementType:
        return ELEMENTS[self.element]

    @property
    def dtype(self) -> torch.dtype:
        """Of ``data``."""
        return self.type.dtype

    @property
    def values(self) -> int:
        """Columns that are stored together."""
        return self.type.values

    @property
    def bits(self) -> float:
        """Of one element, scales left out."""
        return 8 * self.type.dtype.itemsize * self.type.stored / self.type.values

    @property
    def scale_kind(self) -> ScaleKind:
        return _SCALE_KINDS.get(self.scale_dtype, "float")

    @property
    def key_dtype(self) -> torch.dtype | str:
        """What ``QuantKey`` calls the elements together with their scales."""
        row, col = self.group  # no tuple's equal where torch 2.11 traces
        if self.scale_kind == "e8m0" and row == 1 and col == 32:
            return _MX_NAMES.get(self.element, self.element)
        if self.element == "e2m1" and self.scale_kind == "e4m3":
            return "nvfp4"
        return self.dtype if self.element in ("e4m3", "int8") else self.element

    @property
    def key(self) -> QuantKey:
        """What selection looks for."""
        return QuantKey(
            self.key_dtype,
            True,
            self.group,
            self.symmetric,
            self.scale_kind,
            self.second_scale,
            self.act_order,
        )

    @property
    def name(self) -> str:
        """A short name: fp8_tensor, fp8_block, int8_channel, int4_g128, mxfp4, nvfp4, ..."""
        dtype = self.key_dtype
        if isinstance(dtype, str) and dtype != "int4":
            return dtype
        base = "fp8" if self.element == "e4m3" else self.element
        row, col = self.group
        shared = {PER_TENSOR: "tensor", PER_ROW: "channel", (128, 128): "block"}.get(
            self.group, f"g{col}" if row == 1 else f"block_{row}x{col}"
        )
        words = [base, shared, *["zp"] * (not self.symmetric), *["act_order"] * self.act_order]
        return "_".join(words)

    def data_columns(self, K: int) -> int:
        """Stored numbers of a row of K elements; ValueError where K cuts a packed unit."""
        if K % self.values:
            raise ValueError(
                f"{K} columns are no multiple of the {self.values} that {self.element} packs"
            )
        return K // self.type.values * self.type.stored

    def scale_shape(self, N: int, K: int, shards: int = 1) -> tuple[int, ...] | None:
        """Of ``scale`` (and ``zero_point``) of one expert's [N, K], None where there is none."""
        if self.scale_dtype is None:
            return None
        if shards < 1 or N % shards:
            raise ValueError(f"{N} rows are not {shards} equal shards")
        row, col = self.group
        if row == -1:
            return (shards,)
        if row == 1 and col > 0 and K % col:
            raise ValueError(f"groups of {col} columns do not divide {K} columns")
        rows = shards * -(-(N // shards) // row)
        return rows, 1 if col == -1 else -(-K // col)
