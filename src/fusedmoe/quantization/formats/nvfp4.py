"""NVFP4 weights: e2m1 with an e4m3 scale per 16 columns, and an fp32 scale per shard.

    data   uint8 [e, N, K / 2], as MXFP4's
    scale  float8_e4m3fn [e, N, K / 16]
    scale2 fp32 [e, S]
    value = e2m1 * scale * scale2

Some files hold 1 / scale2, and scales in tiles of 128 rows by 4 columns (``unswizzle_scales``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusedmoe.quantization.formats.fp8 import FP8_MAX, divided
from fusedmoe.quantization.formats.fp8 import encode as encode_fp8
from fusedmoe.quantization.formats.minifloat import E2M1
from fusedmoe.quantization.formats.mxfp4 import decode, encode
from fusedmoe.quantization.keys import GroupShape
from fusedmoe.quantization.tensor import QuantFormat

__all__ = ["NVFP4", "decode", "encode", "scales_for", "swizzle_scales", "unswizzle_scales"]

NVFP4 = QuantFormat(
    element="e2m1", group=GroupShape(1, 16), scale_dtype=torch.float8_e4m3fn, second_scale=True
)

_TILE_ROWS, _TILE_COLUMNS = 128, 4


def global_scale_for(amax: torch.Tensor) -> torch.Tensor:
    """fp32: puts the largest value at 6 times the largest scale; 1 where all is zero."""
    return torch.where(amax == 0, 1.0, divided(amax, FP8_MAX * E2M1.max)).float()


def scales_for(amax: torch.Tensor, scale2: torch.Tensor) -> torch.Tensor:
    """e4m3 scales of groups with largest values ``amax`` under ``scale2`` (broadcast).

    A group of zeros, and one too small for e4m3, gets the scale 1 and zeros for values.
    """
    scale = encode_fp8(amax / (E2M1.max * scale2.to(amax.dtype))).float()
    return encode_fp8(scale.masked_fill(scale == 0, 1.0))


def swizzle_scales(scale: torch.Tensor) -> torch.Tensor:
    """[..., R, C] -> [..., ceil(R / 128) * ceil(C / 4) * 512], tiles that tensor cores read.

    Row 32 b + a of a 128 x 4 tile lies at 16 a + 4 b + column; missing rows and columns are zero.
    """
    R, C = scale.shape[-2:]
    x = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    x = F.pad(x, (0, -C % _TILE_COLUMNS, 0, -R % _TILE_ROWS))
    x = x.unflatten(-1, (-1, _TILE_COLUMNS)).unflatten(-3, (-1, 4, 32))  # [.., R', 4, 32, C', 4]
    x = x.movedim(-2, -4).transpose(-2, -3)  # [.., R', C', 32, 4, 4]
    return x.flatten(-5).contiguous().view(scale.dtype)


def unswizzle_scales(swizzled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of ``swizzle_scales``: [..., rows, columns].

    Raises ValueError for another number of scales than this matrix has.
    """
    tiles = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    wanted = tiles[0] * tiles[1] * _TILE_ROWS * _TILE_COLUMNS
    if swizzled.shape[-1] != wanted:
        raise ValueError(
            f"tiled scales of {rows} x {columns}: expected {wanted} numbers, found "
            f"{swizzled.shape[-1]}"
        )
    x = swizzled.view(torch.uint8) if swizzled.element_size() == 1 else swizzled
    x = x.unflatten(-1, (*tiles, 32, 4, _TILE_COLUMNS))
    x = x.transpose(-2, -3).movedim(-4, -2).flatten(-2).flatten(-4, -2)
    return x[..., :rows, :columns].contiguous().view(swizzled.dtype)
