"""FusedMoEQuantDesc: how one operand of the two products is quantized, and with which tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedmoe.quantization.keys import (
    PER_ROW,
    PER_TENSOR,
    PER_TOKEN,
    GroupShape,
    QuantKey,
    ScaleKind,
)
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor

QuantDtype = torch.dtype | str


@dataclass(frozen=True, kw_only=True)
class FusedMoEQuantDesc:
    """How one operand (rows or weights) of one product is quantized; ``dtype`` None: not at all.

    A weight has a ``format``, and its ``scale``, ``scale2``, ``zp`` and ``group_index`` are the
    parts of a ``QuantizedTensor`` whose data is the weight itself. An activation with a ``scale``
    (fp32 [1]) is quantized with it, one without by its values; ``scale_kind`` "e8m0" rounds such
    scales up to powers of two. ``alpha_or_gscale`` is what the API reference calls so: 1 / scale of
    an activation, the product of both global scales of a weight.
    """

    dtype: QuantDtype | None = None
    shape: GroupShape | None = None
    scale: torch.Tensor | None = None
    alpha_or_gscale: torch.Tensor | None = None
    zp: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale2: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    format: QuantFormat | None = None
    scale_kind: ScaleKind = "float"

    @classmethod
    def of_weight(
        cls, fmt: QuantFormat, scale: torch.Tensor | None, **parts: torch.Tensor | None
    ) -> FusedMoEQuantDesc:
        """A weight in ``fmt`` with its ``scale`` and whatever else it has."""
        return cls(dtype=fmt.key_dtype, shape=fmt.group, format=fmt, scale=scale, **parts)  # type: ignore[arg-type]

    @property
    def key(self) -> QuantKey | None:
        """What selection compares; None for an operand that is not quantized."""
        if self.format is not None:
            return self.format.key
        if self.dtype is None:
            return None
        nvfp4 = self.dtype == "nvfp4"
        return QuantKey(
            self.dtype,
            self.scale is not None,
            self.shape or PER_TENSOR,
            scale_kind="e4m3" if nvfp4 else self.scale_kind,
            second_scale=nvfp4,
        )

    def weight(
        self, data: torch.Tensor, dtype: torch.dtype, *, shards: int = 1, interleaved: bool = False
    ) -> QuantizedTensor:
        """``data`` [e, N, packed columns] with the parts described here.

        ``shards`` and ``interleaved`` as ``QuantizedTensor`` has them; one scale per expert stands
        for all shards. Raises ValueError where the parts do not fit the data.
        """
        fmt = self.format
        if fmt is None:
            raise ValueError(f"no format describes {self.dtype or 'unquantized'} weights")
        *lead, columns = data.shape
        K = columns // fmt.type.stored * fmt.values
        scale = _by_shard(self.scale, shards) if fmt.group == PER_TENSOR else self.scale
        return QuantizedTensor(
            format=fmt,
            data=data,
            scale=scale,
            shape=(*lead, K),
            dtype=dtype,
            scale2=_by_shard(self.scale2, shards),
            zero_point=self.zp,
            group_index=self.group_index,
            shards=shards,
            interleaved=interleaved,
        )


def _by_shard(scale: torch.Tensor | None, shards: int) -> torch.Tensor | None:
    """[e] or [e, S], or either with axes of length one, as [e, S]."""
    if scale is None or scale.dim() == 0:
        return scale
    flat = scale.flatten(1) if scale.dim() > 1 else scale.unsqueeze(1)
    return flat.expand(-1, shards).contiguous() if flat.shape[1] == 1 else flat


_OWN_COLUMNS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "mxfp6_e3m2": 32, "mxfp6_e2m3": 32}


def _group(dtype: QuantDtype, blocks: GroupShape | None, whole: GroupShape) -> GroupShape:
    """What shares a scale: fixed by the format, or blocks, or the whole row or tensor."""
    if dtype in _OWN_COLUMNS:
        return GroupShape(1, _OWN_COLUMNS[str(dtype)])
    return blocks or whole


def activation_desc(
    dtype: QuantDtype | None,
    blocks: GroupShape | None,
    per_token: bool,
    scale: torch.Tensor | None,
    gscale: torch.Tensor | None,
    scale_kind: ScaleKind,
) -> FusedMoEQuantDesc:
    """An activation as ``FusedMoEQuantConfig.make`` is told about it."""
    if dtype is None:
        return FusedMoEQuantDesc(scale=scale, alpha_or_gscale=gscale)
    is_mx = str(dtype).startswith("mx")
    if dtype == "nvfp4" and scale is None and gscale is not None:
        if not gscale.numel():
            raise ValueError("an activation's global scale is [1] or [e], got none")
        scale = gscale.amin().reciprocal().reshape(1)
    return FusedMoEQuantDesc(
        dtype=dtype,
        shape=_group(
            dtype, blocks and GroupShape(1, blocks.col), PER_TOKEN if per_token else PER_TENSOR
        ),
        scale=None if is_mx else scale,
        alpha_or_gscale=gscale,
        scale_kind="e8m0" if is_mx else scale_kind,
    )


def weight_desc(
    name: str,
    dtype: QuantDtype | None,
    blocks: GroupShape | None,
    per_channel: bool,
    scale: torch.Tensor | None,
    *,
    alphas: torch.Tensor | None = None,
    gscale: torch.Tensor | None = None,
    zp: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> FusedMoEQuantDesc:
    """A weight as ``FusedMoEQuantConfig.make`` is told about it; errors call it ``name``."""
    if dtype is None:
        return FusedMoEQuantDesc(scale=scale, alpha_or_gscale=alphas, zp=zp, bias=bias)
    if scale is None:
        raise ValueError(f"{name}_scale: {dtype} weights need scales, found none")
    fmt = QuantFormat.of(
        dtype,
        _group(dtype, blocks, PER_ROW if per_channel else PER_TENSOR),
        scale.dtype,
        symmetric=zp is None,
        act_order=group_index is not None,
    )
    given, scale2 = alphas, None
    if fmt.second_scale:
        if alphas is None:
            raise ValueError(f"{name}: {dtype} weights need second scales, found none")
        if gscale is not None:
            if alphas.dim() < 1 or gscale.numel() not in (1, alphas.shape[0]):
                raise ValueError(
                    f"{name}: second scales {tuple(alphas.shape)} and global scales of activations "
                    f"{tuple(gscale.shape)} are not of as many experts"
                )
            alphas = alphas * gscale.reshape(-1, *(1,) * (alphas.dim() - 1))
        scale2 = alphas.float()
    return FusedMoEQuantDesc(
        dtype=dtype,
        shape=fmt.group,
        scale=scale,
        alpha_or_gscale=given,
        zp=zp,
        bias=bias,
        scale2=scale2,
        group_index=group_index,
        format=fmt,
    )
