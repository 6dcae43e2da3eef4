"""The formats: one file each, which says how its numbers are stored, made and read.

``quantize`` and ``dequantize`` are the definition that kernels are tested against.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from fusedmoe.quantization.formats import (
    fp8,
    int4,
    int8,
    lookup,
    mxfp4,
    mxfp6,
    mxfp8,
    nvfp4,
    superblocks,
)
from fusedmoe.quantization.formats.e8m0 import decode_e8m0
from fusedmoe.quantization.formats.fp8 import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, fp8_block
from fusedmoe.quantization.formats.groups import Grid, columns_by_group, columns_of
from fusedmoe.quantization.formats.int4 import int4_group
from fusedmoe.quantization.formats.int8 import INT8_CHANNEL, int8_group
from fusedmoe.quantization.formats.lookup import IQ4_NL, NF4
from fusedmoe.quantization.formats.mxfp4 import MXFP4
from fusedmoe.quantization.formats.mxfp6 import MXFP6_E2M3, MXFP6_E3M2
from fusedmoe.quantization.formats.mxfp8 import MXFP8
from fusedmoe.quantization.formats.nvfp4 import NVFP4, swizzle_scales, unswizzle_scales
from fusedmoe.quantization.formats.superblocks import superblock_format
from fusedmoe.quantization.keys import PER_ROW, PER_TENSOR
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor

__all__ = [
    "FP8_BLOCK",
    "FP8_CHANNEL",
    "FP8_TENSOR",
    "INT8_CHANNEL",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8",
    "NF4",
    "NVFP4",
    "dequantize",
    "format_named",
    "fp8_block",
    "int4_group",
    "int8_group",
    "quantize",
    "scale_values",
    "swizzle_scales",
    "unswizzle_scales",
]

_CODECS: dict[str, Any] = {
    "int8": int8,
    "int4": int4,
    **mxfp6.CODECS,
    **lookup.CODECS,
    **superblocks.CODECS,
}
_CODECS_BY_SCALE: dict[tuple[str, str], Any] = {
    ("e4m3", "float"): fp8,
    ("e4m3", "e8m0"): mxfp8,
    ("e2m1", "e8m0"): mxfp4,
    ("e2m1", "e4m3"): nvfp4,
}
_FIXED = {
    fmt.name: fmt
    for fmt in (
        FP8_TENSOR,
        FP8_CHANNEL,
        FP8_BLOCK,
        MXFP4,
        MXFP8,
        MXFP6_E3M2,
        MXFP6_E2M3,
        NVFP4,
        NF4,
        IQ4_NL,
        *map(superblock_format, superblocks.CODECS),
    )
}


SHORT_NAMES = {
    "fp8": "fp8_channel",
    "fp8_per_tensor": "fp8_tensor",
    "fp8_per_block": "fp8_block",
    "int8": "int8_channel",
    "experts_int8": "int8_channel",
    "int4": "int4_g128",
}


def format_named(name: str) -> QuantFormat:
    """The format that ``QuantFormat.name`` calls so: "fp8_block", "int4_g128", "mxfp4", ...

    Integer formats are int4 or int8, then _channel or _g<columns>, then perhaps _zp and
    _act_order; fp8 blocks of other sizes fp8_block_<rows>x<columns>. ``SHORT_NAMES`` stand for the
    usual ones. ValueError for other names.
    """
    if not isinstance(name, str):
        raise ValueError(f"a weight format goes by a name such as 'int4_g128', got {name!r}")
    name = SHORT_NAMES.get(name, name)
    if name in _FIXED:
        return _FIXED[name]
    block = re.fullmatch(r"fp8_(?:block_(\d+)x|g)(\d+)", name)
    if block:
        return fp8_block(int(block[1] or 1), int(block[2]))
    integers = re.fullmatch(r"int([48])_(?:channel|g(\d+))(_zp)?(_act_order)?", name)
    if integers is None:
        raise ValueError(
            f"unknown weight format {name!r}; known: {', '.join(_FIXED)}, and names like "
            "fp8_block_64x128, int8_channel, int8_g128, int4_channel, int4_g32, int4_g128_zp"
        )
    make = int4_group if integers[1] == "4" else int8_group
    return make(
        int(integers[2] or -1), symmetric=not integers[3], act_order=integers[4] is not None
    )


def codec(fmt: QuantFormat) -> Any:
    """What encodes and decodes the elements of ``fmt``; ValueError where there is none."""
    found = _CODECS.get(fmt.element) or _CODECS_BY_SCALE.get((fmt.element, fmt.scale_kind))
    if found is None:
        raise ValueError(f"{fmt.element} elements with {fmt.scale_kind} scales are no format here")
    return found


def scale_values(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """All that multiplies, in ``dtype``: [..., N, K / g] or [..., N, 1] or as blocks are stored.

    A second scale is multiplied in; scales per tensor become scales per row.
    """
    if q.scale is None:
        return None
    e8m0 = q.format.scale_kind == "e8m0"
    scale = decode_e8m0(q.scale, dtype) if e8m0 else q.scale.to(dtype)
    grid, N = Grid.of(q), q.shape[-2]
    if grid.group.row == -1:
        scale = grid.spread(scale, N, 1)
    if q.scale2 is not None:
        whole = grid._replace(group=PER_TENSOR)
        scale = scale * whole.spread(q.scale2.to(dtype), N, 1)
    return scale


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(element - zero point) * scale * scale2, all in ``dtype`` (fp32 or fp64): ``q.shape``."""
    values = codec(q.format).decode(q.data, dtype)
    scale = scale_values(q, dtype)
    if scale is None:
        return values
    N, K = q.shape[-2:]
    group = PER_ROW if q.format.group.row == -1 else q.format.group
    grid = Grid(group, q.shards, q.interleaved)
    if q.zero_point is not None:
        zero = q.zero_point.to(dtype)
        values = values - grid.spread(zero, N, K, q.group_index)
    elif q.format.type.zero:
        values = values - q.format.type.zero
    values = values * grid.spread(scale, N, K, q.group_index)
    if q.group_index is None:
        return values
    places = columns_of(q.group_index).argsort(-1)
    shard = grid._replace(group=PER_TENSOR).row_index(N, values.device)
    return values.gather(-1, places[..., shard, :])


def quantize(
    weight: torch.Tensor,
    fmt: QuantFormat,
    *,
    shards: int = 1,
    interleaved: bool = False,
    group_index: torch.Tensor | None = None,
    like: QuantizedTensor | None = None,
) -> QuantizedTensor:
    """Round weight [..., N, K] (any float; computed in fp32, fp64 stays fp64) to ``fmt``.

    Scales come from each group's largest value, or from ``like``, which has the same shape.
    ``group_index`` int32 [..., S, K] belongs to act-order formats. Elements are rounded to the
    nearest, ties to even, and saturate. Raises ValueError for weights that are not finite and for
    sizes that the format cannot hold.
    """
    if not weight.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{bad} of {weight.numel()} weights to quantize are not finite")
    if fmt.act_order != (group_index is not None):
        raise ValueError(
            f"{fmt.name}: group_index belongs to act-order formats, and to all of them"
        )
    if group_index is not None and group_index.numel() and int(group_index.min()) < 0:
        raise ValueError(f"group_index: expected groups, found {int(group_index.min())}")
    values = weight if weight.dtype == torch.float64 else weight.float()
    grid = Grid(fmt.group, shards, interleaved)
    N, K = weight.shape[-2:]
    parts = _parts_of(like) if like is not None else _scales(values, fmt, grid, group_index)
    q = QuantizedTensor(
        format=fmt,
        data=torch.empty(
            *weight.shape[:-1], fmt.data_columns(K), dtype=fmt.dtype, device=weight.device
        ),
        shape=tuple(weight.shape),
        dtype=torch.bfloat16 if weight.dtype == torch.float64 else weight.dtype,
        group_index=group_index,
        shards=shards,
        interleaved=interleaved,
        **parts,
    )
    scale = scale_values(q, values.dtype)
    assert scale is not None
    group = PER_ROW if fmt.group.row == -1 else fmt.group
    spread = grid._replace(group=group).spread
    values = values / spread(scale.masked_fill(scale == 0, 1.0), N, K, group_index)
    if q.zero_point is not None:
        values = values.round() + spread(q.zero_point.to(values.dtype), N, K, group_index)
    elif fmt.type.zero:
        values = values + fmt.type.zero
    q.data.copy_(codec(fmt).encode(values))
    return q


def _parts_of(like: QuantizedTensor) -> dict[str, torch.Tensor | None]:
    return {name: getattr(like, name) for name in ("scale", "scale2", "zero_point")}


def _scales(
    values: torch.Tensor, fmt: QuantFormat, grid: Grid, group_index: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """scale, scale2 and zero_point of a format, from the values of its groups."""
    N, K = values.shape[-2:]
    fmt.scale_shape(N, K, grid.shards)  # raises where the groups do not fit
    if group_index is not None:
        order = columns_by_group(group_index, fmt.group.col)
        shard = grid._replace(group=PER_TENSOR).row_index(N, values.device)
        values = values.gather(-1, order[..., shard, :])
    groups = grid.split(values)
    if fmt.element in ("int4", "int8"):
        scale, zero = _integer_scales(groups, fmt)
        return {"scale": _of_tensor(scale, fmt), "zero_point": zero, "scale2": None}
    amax = groups.abs().amax(-1)
    if fmt.second_scale:
        whole = grid._replace(group=PER_TENSOR)
        scale2 = nvfp4.global_scale_for(whole.split(values).abs().amax(-1).squeeze(-1))
        rows = whole.spread(scale2, N, 1)
        return {"scale": nvfp4.scales_for(amax, rows), "scale2": scale2, "zero_point": None}
    scale = codec(fmt).scale_for(amax)
    if fmt.scale_kind == "float":
        scale = scale.to(fmt.scale_dtype)
        scale = scale.masked_fill(scale == 0, fmt.type.zeros_scale)
    return {"scale": _of_tensor(scale, fmt), "scale2": None, "zero_point": None}


def _of_tensor(scale: torch.Tensor, fmt: QuantFormat) -> torch.Tensor:
    return scale.squeeze(-1) if fmt.group.row == -1 else scale


def _integer_scales(
    groups: torch.Tensor, fmt: QuantFormat
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point that map each group onto the whole range of integers.

    Symmetric: the larger of max / 7 and -min / 8 (127, 128). With a zero point: the range is
    stretched to contain 0, and 0 is exact.
    """
    low_code, high_code = (-8, 7) if fmt.element == "int4" else (int8.INT8_MIN, int8.INT8_MAX)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if fmt.symmetric:
        scale = torch.maximum(high / high_code, low / low_code).to(fmt.scale_dtype)
        return scale.masked_fill(scale == 0, 1.0), None
    scale = ((high - low) / (high_code - low_code)).to(fmt.scale_dtype)
    scale = scale.masked_fill(scale == 0, 1.0)
    base = 0 if fmt.element == "int4" else low_code
    zero = (base - low / scale.to(low.dtype)).round().clamp(base, base + 2**fmt.bits - 1)
    return scale, zero.to(fmt.dtype)
