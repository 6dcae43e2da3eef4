"""Products with integer weights on a CPU, in torch's own kernels, weights packed once.

int8: oneDNN multiplies bytes by bytes into exact int32 sums, one product for each group of columns.
Rows quantized to int8 enter as they are. Rows of floats become 16-bit integers, two bytes and so
two rows: their error is 2^-16 of the row's largest value, far below bf16's rounding, and weights
are still read once.

int4: torch's packed kernel, which takes and gives bf16. Rows that bf16 does not hold enter as two.
The kernel adds (8 - zero point) * scale in bf16; what that rounding loses is added afterwards.
Where bf16 does not hold the scales of groups, a second product brings what it lost of them: without
it a layer's error would be 4.3e-3 to 4.9e-3; so it is 3.0e-3 to 3.7e-3, as with scales in bf16.

Measured on two Zen 5 cores (torch 2.13), M = 1 row, weights [2048, 2048]: bf16 137 us, int8 72,
int8 with 16-bit rows 83, int4 63; the int4 kernel's time grows with M, oneDNN's hardly does.

M rows, N and K of a weight [N, K], g columns to a group, G = K / g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from fusedmoe.quantization.formats.int4 import OFFSET, unpack_nibbles
from fusedmoe.quantization.tensor import QuantizedTensor

_KERNEL_GROUPS = (256, 128, 64, 32)
_KERNEL_ROWS = 16
_LEAST_AMAX = 1e-10
_HALVES_MAX = 127 * 256 + 127


def _qlinear(*arguments: object) -> torch.Tensor:
    return torch.ops.onednn.qlinear_pointwise.default(*arguments)


def unmet_int8() -> str | None:
    """Why int8 products cannot run on this CPU, None where they can."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.cpu._is_vnni_supported():
        return "needs a CPU with VNNI and torch's oneDNN"
    return None


def unmet_int4(N: int, K: int, g: int) -> str | None:
    """Why torch's int4 kernel cannot multiply by [N, K] in groups of ``g`` (-1: whole rows)."""
    if not torch.cpu._is_avx512_supported():
        return "needs a CPU with AVX-512"
    least = _KERNEL_GROUPS[-1]
    if N % _KERNEL_ROWS or K % least or (g > 0 and g % least):
        return (
            f"needs {_KERNEL_ROWS} to divide the rows, and {least} the columns and groups, of "
            f"weights [{N}, {K}] in groups of {g}"
        )
    return None


def _sizes(counts: int | Sequence[int], parts: int) -> int | list[int]:
    return counts * parts if isinstance(counts, int) else [count * parts for count in counts]


class ByteRows(NamedTuple):
    """Rows as bytes, 128 added: uint8 [M, K], scale fp32 [M, 1] (or [1], for all).

    Or [2 * M, K], each row's low bytes followed by its high bytes, and scale [M, 2]. ``sums`` fp32
    [M, G] over groups of columns, where zero points need them.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor | None = None
    parts: int = 1

    def split(self, counts: int | Sequence[int]) -> list[ByteRows]:
        codes = self.codes.split(_sizes(counts, self.parts))
        shared = self.scale.dim() == 1
        scales = (self.scale,) * len(codes) if shared else self.scale.split(counts)
        sums = (None,) * len(codes) if self.sums is None else self.sums.split(counts)
        return [ByteRows(*pieces, self.parts) for pieces in zip(codes, scales, sums, strict=True)]


def byte_rows(x: torch.Tensor, scale: torch.Tensor | None = None) -> ByteRows:
    """x [M, K] quantized to int8 as ``quantization.activations`` defines it."""
    if scale is None:
        scale = _amax(x) / 127
    codes = (x.float() / scale).round_().clamp_(-128, 127).add_(128)
    return ByteRows(codes.to(torch.uint8), scale)


def half_rows(x: torch.Tensor, g: int = 0) -> ByteRows:
    """x [M, K] as 16-bit integers in two bytes each; sums over ``g`` columns unless that is 0."""
    scale = _amax(x) / _HALVES_MAX
    rounded = (x.float() / scale).round_()
    # Both bytes of v + 128 * 256 + 128 are those of v with 128 added to each.
    four = (rounded + 128 * 257).to(torch.int32).view(torch.uint8).unflatten(-1, (-1, 4))
    codes = four[..., :2].transpose(1, 2).flatten(0, 1)
    sums = (rounded * scale).unflatten(-1, (-1, g)).sum(-1) if g else None
    return ByteRows(codes, torch.cat([scale, 256 * scale], 1), sums, 2)


def _amax(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True).float().clamp(min=_LEAST_AMAX)


class Int8Weight(NamedTuple):
    """G matrices [N, g] in oneDNN's layout, and for each a scale fp32 [N]; zeros int32 [N].

    ``offset`` fp32 [G, N] is -zero point * scale, None without zero points.
    """

    packed: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]
    zeros: torch.Tensor
    offset: torch.Tensor | None


def int8_weights(q: QuantizedTensor) -> list[Int8Weight]:
    """Each expert of an int8 tensor with scales per row or group of columns."""
    return [_int8_weight(q[expert]) for expert in range(q.shape[0])]


def _int8_weight(q: QuantizedTensor) -> Int8Weight:
    assert q.scale is not None
    scale = q.scale.float().T.contiguous()  # [G, N]
    offset = None if q.zero_point is None else -q.zero_point.float().T * scale
    return Int8Weight(
        tuple(
            torch.ops.onednn.qlinear_prepack(group.contiguous(), None)
            for group in q.data.chunk(scale.shape[0], 1)
        ),
        scale.unbind(0),
        torch.zeros(q.shape[-2], dtype=torch.int32),
        offset,
    )


def int8_linear(rows: ByteRows, weight: Int8Weight, out: torch.Tensor) -> None:
    """Write rows times the transposed weight into ``out`` fp32 [M, N]."""
    groups = len(weight.packed)
    pieces = (rows.codes,) if groups == 1 else rows.codes.chunk(groups, 1)
    y, *more = [
        _qlinear(
            *(piece, 1.0, 128, packed, scale, weight.zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        for piece, packed, scale in zip(pieces, weight.packed, weight.scales, strict=True)
    ]
    for part in more:
        y += part
    if rows.parts == 1:
        torch.mul(y, rows.scale, out=out)
    elif out.shape[0] == 1:
        torch.mm(rows.scale, y, out=out)
    else:
        torch.bmm(rows.scale.unsqueeze(1), y.unflatten(0, (-1, 2)), out=out.unsqueeze(1))
    if weight.offset is not None:
        assert rows.sums is not None
        out.addmm_(rows.sums, weight.offset)


class FloatRows(NamedTuple):
    """Rows in bf16 [2 * M, K], each followed by what its rounding lost ([M, K] if that is nothing).

    ``sums`` fp32 [M, G] over groups of columns, where zero points need them.
    """

    x: torch.Tensor
    sums: torch.Tensor | None = None
    parts: int = 2

    def split(self, counts: int | Sequence[int]) -> list[FloatRows]:
        x = self.x.split(_sizes(counts, self.parts))
        sums = (None,) * len(x) if self.sums is None else self.sums.split(counts)
        return [FloatRows(*pieces, self.parts) for pieces in zip(x, sums, strict=True)]


def float_rows(x: torch.Tensor, g: int, exact: bool) -> FloatRows:
    """x [M, K] as bf16, which holds it exactly or not; sums over ``g`` columns unless that is 0."""
    sums = x.float().unflatten(-1, (-1, g)).sum(-1) if g else None
    high = x.bfloat16()
    if exact:
        return FloatRows(high, sums, 1)
    return FloatRows(torch.stack([high, (x - high).bfloat16()], 1).flatten(0, 1), sums)


class Int4Weight(NamedTuple):
    """Nibbles in the kernel's layout, scales bf16 [K / group, N, 2]: (scale, what is added).

    ``rest``, as ``scales``, is what rounding took from these, None where that is nothing.
    ``offset`` fp32 [G, N] is what rounding took from what is added, None without zero points.
    ``factor`` fp32 [N] multiplies the product where rows have one scale; ``scales`` leave it out.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    rest: torch.Tensor | None
    group: int
    offset: torch.Tensor | None
    factor: torch.Tensor | None


def int4_weights(q: QuantizedTensor) -> list[Int4Weight]:
    """Each expert of an int4 tensor with scales per row or group of columns."""
    K, g = q.shape[-1], q.format.group.col
    group = next(size for size in _KERNEL_GROUPS if (K if g < 0 else g) % size == 0)
    return [_int4_weight(q[expert], group) for expert in range(q.shape[0])]


def _int4_weight(q: QuantizedTensor, group: int) -> Int4Weight:
    assert q.scale is not None
    scale = q.scale.float().T  # [G, N]
    repeats, factor = q.shape[-1] // group // scale.shape[0], None
    if scale.shape[0] == 1:
        factor, scale = scale[0].contiguous(), torch.ones_like(scale)
    added, offset = torch.zeros_like(scale), None
    if q.zero_point is not None:
        exact = (OFFSET - q.zero_point.float()).T * scale
        added = exact.bfloat16().float()
        offset = None if factor is not None else exact - added  # small integers are exact
    lost = scale - scale.bfloat16().float()
    codes = unpack_nibbles(q.data).int().contiguous()
    return Int4Weight(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2),
        _kernel_scales(scale, added, repeats),
        _kernel_scales(lost, torch.zeros_like(lost), repeats) if lost.any() else None,
        group,
        offset,
        factor,
    )


def _kernel_scales(scale: torch.Tensor, added: torch.Tensor, repeats: int) -> torch.Tensor:
    """[G, N] each to bf16 [G * repeats, N, 2]."""
    return torch.stack([scale, added], -1).repeat_interleave(repeats, 0).bfloat16().contiguous()


def int4_linear(rows: FloatRows, weight: Int4Weight, out: torch.Tensor) -> None:
    """Write rows times the transposed weight into ``out`` [M, N]."""
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows.x, weight.packed, weight.group, weight.scales
    )
    if rows.parts == 2:
        y = y.float().unflatten(0, (-1, 2)).sum(1)
    if weight.rest is not None:
        high = rows.x[:: rows.parts].contiguous()  # of what is lost, the first bits are enough
        y = y.float() + torch.ops.aten._weight_int4pack_mm_for_cpu(
            high, weight.packed, weight.group, weight.rest
        )
    if weight.offset is not None:
        assert rows.sums is not None
        y = torch.addmm(y.float(), rows.sums, weight.offset)
    if weight.factor is not None:
        y = y * weight.factor
    out.copy_(y)


def row_encoder(q: QuantizedTensor, *, exact: bool) -> Callable[[torch.Tensor], object]:
    """What makes the rows of floats that enter products with ``q``; ``exact``: they are bf16."""
    columns = q.shape[-1] if q.format.group.col == -1 else q.format.group.col
    g = 0 if q.zero_point is None else columns
    if q.format.element == "int8":
        return partial(half_rows, g=g)
    return partial(float_rows, g=g, exact=exact)
