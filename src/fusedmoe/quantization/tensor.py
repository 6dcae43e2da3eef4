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

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fusedmoe.quantization.quant_format import ELEMENTS, ElementType, QuantFormat

__all__ = ["ELEMENTS", "ElementType", "QuantFormat", "QuantizedTensor"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
        floats = _FLOATS if fmt.scale_kind == "float" else (fmt.scale_dtype or torch.uint8,)
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
        """Raise ValueError, naming ``name`` and the part, for a scale of inf or NaN, or a group
        index out of range. Reads the values: on a GPU it waits for them.
        """
        scales = {"scale": self.scale, "scale2": self.scale2}
        for part, scale in scales.items():
            if scale is None:
                continue
            bad = scale == 255 if scale.dtype == torch.uint8 else ~scale.float().isfinite()
            if bad.any():
                at = bad.nonzero()[0].tolist()
                found = "NaN" if scale.dtype == torch.uint8 else float(scale.float()[tuple(at)])
                raise ValueError(
                    f"{name}: {int(bad.sum())} of {bad.numel()} numbers of its {part} are not "
                    f"finite; the first is {found} at {at}"
                )
        if self.group_index is not None and self.group_index.numel():
            self._check_group_index(name, self.group_index.flatten(0, -2))

    def _check_group_index(self, name: str, index: torch.Tensor) -> None:
        """index [shards of all experts, K]"""
        assert self.scale is not None
        K, groups = index.shape[-1], self.scale.shape[-1]
        is_sorted = (~index).sort(-1).values.eq(torch.arange(K, device=index.device)).all(-1)
        if is_sorted.any() and groups * self.format.group.col != K:
            raise ValueError(f"{name}: {K} sorted columns for {groups} {self.format.name} groups")
        rest = index[~is_sorted]
        low, high = (int(bound) for bound in rest.aminmax()) if rest.numel() else (0, 0)
        if low < 0 or high >= groups:
            raise ValueError(f"{name}: group_index lies in [{low}, {high}], not in [0, {groups})")

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
        """``function`` applied to every tensor; it must keep the logical shape."""
        parts: dict[str, Any] = {name: function(part) for name, part in self.parts().items()}
        return replace(self, **parts)

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str) -> QuantizedTensor:
        return self.map(lambda part: part.to(device))

    def __getitem__(self, expert: int) -> QuantizedTensor:
        """One expert, as views."""
        parts: dict[str, Any] = {name: part[expert] for name, part in self.parts().items()}
        return replace(self, shape=self.shape[1:], **parts)

    @property
    def nbytes(self) -> int:
        """Stored, all parts together."""
        return sum(part.nbytes for part in self.parts().values())
