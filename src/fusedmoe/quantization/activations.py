"""Rounding activations to a format: the definition of what kernels do on the way.

x [..., K] are rows (tokens). Everything is computed in fp32 (fp64 stays fp64), the elements are
x / scale rounded to the nearest, ties to even, and saturate. With amax the largest magnitude:

    fp8   per tensor, token     amax / 448, at least 1 / (448 * 512)
          per group of columns  amax / 448, amax at least 1e-10
          with e8m0 scales      the same, rounded up to a power of two
    int8  per tensor, token     amax / 127, amax at least 1e-10
    mx*   per 32 columns        e8m0 as the weight format has it
    nvfp4 per 16 columns        scale2 * e4m3(amax / (6 * scale2)); scale2 given, or per token

A NaN makes its own token NaN. Per tensor, amax is that of the finite numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusedmoe.quantization.formats import nvfp4
from fusedmoe.quantization.formats.e8m0 import ceil_e8m0, decode_e8m0, floor_e8m0
from fusedmoe.quantization.formats.fp8 import FP8_MAX, divided
from fusedmoe.quantization.formats.minifloat import E2M1, E2M3, E3M2, MiniFloat
from fusedmoe.quantization.keys import PER_TENSOR, PER_TOKEN, QuantKey

_MIN_SCALE_FP8 = 1.0 / (FP8_MAX * 512)
_MIN_AMAX = 1e-10
_MINI: dict[torch.dtype | str, MiniFloat] = {
    "mxfp4": E2M1,
    "mxfp6_e3m2": E3M2,
    "mxfp6_e2m3": E2M3,
    "nvfp4": E2M1,
}


def quantize_activation(
    x: torch.Tensor, key: QuantKey, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(elements [..., K] as numbers in fp32, scales) with x ~ elements * spread(scales).

    The scales are fp32: [1] per tensor, [..., 1] per token, [..., ceil(K / g)] per group of
    columns. ``scale`` [1] is what a static key is given (for nvfp4: the second scale). Raises
    ValueError where a static key has none or a dynamic one has.
    """
    if key.static != (scale is not None):
        raise ValueError(f"activations {key}: a scale belongs to static ones, and to all of them")
    x = x if x.dtype == torch.float64 else x.float()
    found = _scale(x, key, scale)
    ratio = x / spread(found, key, x.shape[-1])
    if key.dtype == torch.int8:
        return ratio.round().clamp(-128, 127), found
    if key.dtype in _MINI:
        return _MINI[key.dtype].round(ratio), found
    return ratio.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype), found


def fake_quantize(
    x: torch.Tensor, key: QuantKey | None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """x rounded as ``quantize_activation`` does and multiplied back; as it is without a key."""
    if key is None:
        return x
    elements, found = quantize_activation(x, key, scale)
    return elements * spread(found, key, x.shape[-1])


def spread(scale: torch.Tensor, key: QuantKey, K: int) -> torch.Tensor:
    """One scale per element, or per row where it has one."""
    columns = key.group_shape.col
    return scale if columns == -1 else scale.repeat_interleave(columns, -1)[..., :K]


def _scale(x: torch.Tensor, key: QuantKey, given: torch.Tensor | None) -> torch.Tensor:
    if key.dtype == "nvfp4":
        return _nvfp4_scale(x, given)
    if given is not None:
        return given.to(x.dtype).reshape(1)
    if key.group_shape == PER_TENSOR:
        finite = x.abs().nan_to_num(nan=0.0, posinf=0.0)
        amax = finite.amax().reshape(1) if x.numel() else x.new_zeros(1)
    elif key.group_shape == PER_TOKEN:
        amax = x.abs().amax(-1, keepdim=True)
    else:
        amax = _group_amax(x, key.group_shape.col)
    if key.dtype == torch.int8:
        return divided(amax.clamp(min=_MIN_AMAX), 127)
    if key.dtype in _MINI:
        return decode_e8m0(floor_e8m0(amax, _MINI[key.dtype].max_exponent), x.dtype)
    if key.dtype == "mxfp8":
        return decode_e8m0(ceil_e8m0(amax, FP8_MAX), x.dtype)
    if key.group_shape.col == -1:
        scale = divided(amax, FP8_MAX).clamp(min=_MIN_SCALE_FP8)
    else:
        scale = divided(amax.clamp(min=_MIN_AMAX), FP8_MAX)
    return decode_e8m0(ceil_e8m0(scale, 1.0), x.dtype) if key.scale_kind == "e8m0" else scale


def _nvfp4_scale(x: torch.Tensor, scale2: torch.Tensor | None) -> torch.Tensor:
    if scale2 is None:
        whole = nvfp4.global_scale_for(x.abs().amax(-1, keepdim=True)).to(x.dtype)
    else:
        whole = scale2.to(x.dtype).reshape(1)
    return nvfp4.scales_for(_group_amax(x, 16), whole).to(x.dtype) * whole


def _group_amax(x: torch.Tensor, columns: int) -> torch.Tensor:
    return F.pad(x.abs(), (0, -x.shape[-1] % columns)).unflatten(-1, (-1, columns)).amax(-1)
