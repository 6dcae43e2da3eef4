"""QuantizedTensor: the one in-memory form of quantized expert weights; its type is a QuantFormat.

Rows are output features N, columns input features K; the packed axis is K, and last. Leading
dimensions (the local experts e) are the same in every part. With S shards stacked along N (gate and
up, S = 2; else 1), g columns to a group and blocks of (bn, bk):

    data         [e, N, K] in elements: see ELEMENTS for how many stored numbers that is
    scale        per tensor [e, S]; per row [e, N, 1]; groups [e, N, K / g];
                 blocks [e, S * ceil(N / S / bn), ceil(K / bk)]
    scale2       [e, S] fp32, where the format has a second scale
    zero_point   as scale's groups, in the element's own range, where the format is not symmetric
    group_index  int32 [e, S, K]: the group of each column, where the format is act-order; scale
                 may then have groups that no column here belongs to. Or, where a shard's columns
                 lie sorted by group, position p in group p // g: ~c of the column c at each

    value = (element - zero_point) * scale * scale2

All scales multiply. A format whose elements carry their own scales (GGUF superblocks) has scale
None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

from fusedmoe.quantization.keys import PER_ROW, PER_TENSOR, GroupShape, QuantKey, ScaleKind
from fusedmoe.quantization.stored_values import check_group_index, check_scales
from fusedmoe.words import FLOATS

# Of groups that are proposed in the place of larger ones.
_SMALLEST_GROUP = 16


class ElementType(NamedTuple):
    """How numbers of a kind are stored: ``values`` consecutive columns in ``stored`` numbers.

    ``zero`` is what a symmetric format subtracts, ``zeros_scale`` the scale of groups of zeros, and
    of padding.
    """

    dtype: torch.dtype
    values: int = 1
    stored: int = 1
    zero: int = 0
    zeros_scale: float = 1.0


ELEMENTS: dict[str, ElementType] = {
    "e4m3": ElementType(torch.float8_e4m3fn),
    "int8": ElementType(torch.int8),
    # One byte holds columns 2c (low nibble) and 2c + 1 (high nibble), unsigned.
    "int4": ElementType(torch.uint8, 2, 1, zero=8),
    "e2m1": ElementType(torch.uint8, 2, 1),
    # Three bytes, little-endian, hold columns 4c to 4c + 3 from the lowest bits on.
    "e3m2": ElementType(torch.uint8, 4, 3),
    "e2m3": ElementType(torch.uint8, 4, 3),
    # Nibbles, packed as int4, that index a table. Code 0 is not the value 0 (iq4_nl has none), so
    # that groups of zeros need the scale 0.
    "nf4": ElementType(torch.uint8, 2, 1, zeros_scale=0.0),
    "iq4_nl": ElementType(torch.uint8, 2, 1, zeros_scale=0.0),
    # GGUF's blocks that carry their scales.
    "q2_k": ElementType(torch.uint8, 256, 84),
    "q3_k": ElementType(torch.uint8, 256, 112),
    "q4_k": ElementType(torch.uint8, 256, 144),
    "q5_k": ElementType(torch.uint8, 256, 176),
    "q6_k": ElementType(torch.uint8, 256, 212),
    "q4_1": ElementType(torch.uint8, 32, 20),
    "q5_1": ElementType(torch.uint8, 32, 24),
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
        """How its elements are stored."""
        return ELEMENTS[self.element]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``data``."""
        return self.type.dtype

    @property
    def values(self) -> int:
        """Columns that are stored together."""
        return self.type.values

    @property
    def bits(self) -> float:
        """Bits of one element, scales left out."""
        return 8 * self.type.dtype.itemsize * self.type.stored / self.type.values

    @property
    def scale_kind(self) -> ScaleKind:
        """What a scale is: any float, a power of two (e8m0) or an e4m3 number."""
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
        """The shape of ``scale`` (and ``zero_point``) of one expert's [N, K]; None: no scale."""
        if self.scale_dtype is None:
            return None
        if shards < 1 or N % shards:
            raise ValueError(f"{N} rows are not {shards} equal shards")
        row, col = self.group
        if row == -1:
            return (shards,)
        if row == 1 and col > 0 and K % col:
            raise ValueError(f"groups of {col} columns do not divide {K} columns{self._smaller(K)}")
        rows = shards * -(-(N // shards) // row)
        return rows, 1 if col == -1 else -(-K // col)

    def _smaller(self, K: int) -> str:
        """For a message: the format of smaller groups that divide K columns, if it has any."""
        fitting = math.gcd(K, self.group.col)
        if self.element not in ("int4", "int8") or fitting < _SMALLEST_GROUP:
            return ""
        return f"; those of {replace(self, group=GroupShape(1, fitting)).name} do"


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """Quantized weights in the canonical layout that the module docstring defines.

    ``shape`` is logical (..., N, K), ``dtype`` what it dequantizes to. ``shards`` equal matrices
    are stacked along N: one after the other, or, ``interleaved``, row by row (row r is of shard
    r % shards, and so are the rows of a scale per row or block).

    Raises ValueError, naming the part, where shapes or dtypes disagree; no values are read.
    """

    format: QuantFormat
    data: torch.Tensor
    scale: torch.Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    scale2: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    shards: int = 1
    interleaved: bool = False

    def __post_init__(self) -> None:
        for name, (dtypes, shape) in self._expected().items():
            part = getattr(self, name)
            if shape is None and part is None:
                continue
            what = f"{name} of {self.format.name} {list(self.shape)}"
            if part is None or shape is None:
                found = "none" if part is None else f"{list(part.shape)}"
                wanted = "none" if shape is None else f"{list(shape)}"
                raise ValueError(f"{what}: expected {wanted}, found {found}")
            if tuple(part.shape) != shape:
                raise ValueError(f"{what}: expected shape {list(shape)}, found {list(part.shape)}")
            if part.dtype not in dtypes:
                expected = " or ".join(str(dtype) for dtype in dtypes)
                raise ValueError(f"{what}: expected {expected}, found {part.dtype}")

    def _expected(self) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...] | None]]:
        """(dtypes, shape) of every part; shape None: there must be none."""
        fmt, (*lead, N, K) = self.format, self.shape
        if fmt.act_order and self.scale is not None:
            of_scale: tuple[int, ...] | None = (N, self.scale.shape[-1])  # of other ranks' columns
        else:
            of_scale = fmt.scale_shape(N, K, self.shards)
        scale = None if of_scale is None else (*lead, *of_scale)
        floats = FLOATS if fmt.scale_kind == "float" else (fmt.scale_dtype or torch.uint8,)
        return {
            "data": ((fmt.dtype,), (*lead, N, fmt.data_columns(K))),
            "scale": (floats, scale),
            "scale2": ((torch.float32,), (*lead, self.shards) if fmt.second_scale else None),
            "zero_point": ((fmt.dtype,), None if fmt.symmetric else scale),
            "group_index": ((torch.int32,), (*lead, self.shards, K) if fmt.act_order else None),
        }

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values, ``shape`` in ``dtype`` (None: ``self.dtype``).

        Computed in fp32, or in fp64 where that is asked for (and then exactly).
        """
        from fusedmoe.quantization.formats import dequantize

        dtype = dtype or self.dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return dequantize(self, compute).to(dtype)

    def check_values(self, name: str = "weights") -> None:
        """Raise ValueError, naming ``name`` and the part, for a scale of inf or NaN, an e4m3 scale
        with a sign, or a group index out of range. Reads the values: on a GPU it waits for them.
        """
        for part, scale in {"scale": self.scale, "scale2": self.scale2}.items():
            if scale is not None:
                check_scales(name, part, scale)
        if self.group_index is not None and self.group_index.numel():
            assert self.scale is not None
            index, groups = self.group_index.flatten(0, -2), self.scale.shape[-1]
            check_group_index(name, index, groups, self.format.group.col)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
        """``function`` applied to every tensor; it must keep the logical shape."""
        parts: dict[str, Any] = {name: function(part) for name, part in self.parts().items()}
        return replace(self, **parts)

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """All parts on ``device``."""
        return self.map(lambda part: part.to(device))

    def __getitem__(self, expert: int) -> QuantizedTensor:
        """One expert, as views."""
        parts: dict[str, Any] = {name: part[expert] for name, part in self.parts().items()}
        return replace(self, shape=self.shape[1:], **parts)

    @property
    def nbytes(self) -> int:
        """Stored, all parts together."""
        return sum(part.nbytes for part in self.parts().values())
