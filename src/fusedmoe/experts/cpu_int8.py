"""Products with int8 weights on a CPU, in oneDNN through torch, weights packed once.

oneDNN multiplies bytes by bytes into exact int32 sums, one product for each group of columns.
Rows quantized to int8 enter as they are. Rows of floats become 16-bit integers, two bytes and so
two rows: their error is 2^-16 of the row's largest value, far below bf16's rounding, and weights
are still read once.

Measured on two Zen 5 cores (torch 2.13), M = 1 row, weights [2048, 2048]: bf16 137 us, int8 72,
int8 with 16-bit rows 83, int4 63; the int4 kernel's time grows with M, oneDNN's hardly does.

M rows, N and K of a weight [N, K], g columns to a group, G = K / g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

import torch

from fusedmoe.experts.cpu_act_order import Order, sorted_columns, stored_columns
from fusedmoe.experts.cpu_run import one_by_one, sizes_in_parts
from fusedmoe.quantization.tensor import QuantizedTensor

_LEAST_AMAX = 1e-10
_LEAST_COLUMNS = 128
_HALVES_MAX = 127 * 256 + 127


def _qlinear(*arguments: object) -> torch.Tensor:
    return torch.ops.onednn.qlinear_pointwise.default(*arguments)


def unmet_int8() -> str | None:
    """Why int8 products cannot run on this CPU, None where they can."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.cpu._is_vnni_supported():
        return "needs a CPU with VNNI and torch's oneDNN"
    return None


class ByteRows(NamedTuple):
    """Rows as bytes, 128 added: uint8 [M, K], scale fp32 [M, 1], NaN where the row holds one.

    Or, in two ``parts``, [2 * M, K]: each row's low bytes and then its high ones, which count 256
    times as much. ``sums`` fp32 [M, G] over groups of columns, where zero points need them.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor | None = None
    parts: int = 1

    @property
    def rows(self) -> int:
        """M"""
        return self.codes.shape[0] // self.parts

    def split(self, counts: int | Sequence[int]) -> list[ByteRows]:
        codes = self.codes.split(sizes_in_parts(counts, self.parts))
        scales = self.scale.split(counts)
        sums = (None,) * len(codes) if self.sums is None else self.sums.split(counts)
        return [ByteRows(*pieces, self.parts) for pieces in zip(codes, scales, sums, strict=True)]

    def following(self, order: Order, G: int) -> ByteRows:
        """The rows in the order of an expert's columns, with sums over G groups unless G is 0."""
        codes, sums = self.codes[:, order.columns], None
        if G:
            whole = self.joined(codes.float() - 128) * self.scale
            sums = whole.unflatten(1, (G, -1)).sum(-1)
        return ByteRows(codes, self.scale, sums, self.parts)

    def joined(self, y: torch.Tensor) -> torch.Tensor:
        """Numbers [M, *] of the rows' parts [M * parts, *]; y itself where these are whole rows."""
        return y if self.parts == 1 else torch.add(y[::2], y[1::2], alpha=256)


def byte_rows(x: torch.Tensor, scale: torch.Tensor | None = None) -> ByteRows:
    """x [M, K] quantized to int8 as ``quantization.activations`` defines it, by ``scale`` [1]."""
    if scale is None:
        scale = _amax(x).div_(127)
        codes = (x / scale).round_()  # which is at most 127
    else:
        codes = (x.float() / scale).round_().clamp_(-128, 127)
        scale = scale + codes.sum(-1, keepdim=True).mul_(0)  # no byte is NaN
    return ByteRows(codes.add_(128).to(torch.uint8), scale)


def half_rows(x: torch.Tensor, g: int = 0) -> ByteRows:
    """x [M, K] as 16-bit integers in two bytes each; sums over ``g`` columns unless that is 0."""
    scale = _amax(x).div_(_HALVES_MAX)
    rounded = (x / scale).round_()
    # Both bytes of v + 128 * 256 + 128 are those of v with 128 added to each.
    two = (rounded + 128 * 257).to(torch.uint16).view(torch.uint8).unflatten(-1, (-1, 2))
    codes = two.transpose(1, 2).flatten(0, 1)
    sums = (rounded * scale).unflatten(-1, (-1, g)).sum(-1) if g else None
    return ByteRows(codes, scale, sums, 2)


def _amax(x: torch.Tensor) -> torch.Tensor:
    """fp32 [M, 1]"""
    norm = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
    return norm.clamp_(min=_LEAST_AMAX)


class Int8Weight(NamedTuple):
    """A matrix [N, K] as P = G / m matrices of m groups in oneDNN's layout; zeros int32 [N].

    ``scales``: fp32 of each matrix, [N], or [m, N] of several groups. ``offset`` fp32 [G, N] is
    -zero point * scale, None without zero points. ``order`` is that of the columns where rows have
    to follow it.
    """

    packed: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]
    zeros: torch.Tensor
    offset: torch.Tensor | None
    order: Order | None = None

    @property
    def by_row(self) -> bool:
        """Whether the product is all of it, but for the scale of the rows that enter."""
        first = self.scales[0]
        return len(self.packed) == first.dim() == 1 and self.offset is None and self.order is None


def int8_weights(q: QuantizedTensor) -> list[Int8Weight]:
    """Each expert of an int8 tensor with scales per row or group of columns.

    oneDNN rounds the columns of a matrix up to 64. Smaller groups lie several to a matrix, and a
    row meets each of them with zeros in the place of the others.
    """
    assert q.scale is not None
    scale = q.scale.float().mT.contiguous()  # [e, G, N]
    offset = None if q.zero_point is None else (-q.zero_point.float().mT * scale).contiguous()
    (N, K), G = q.shape[-2:], scale.shape[1]
    matrices = G // gcd(G, max(1, _LEAST_COLUMNS // max(1, K // G)))
    scales = scale if matrices == G else scale.unflatten(1, (matrices, -1))
    zeros = q.data.new_zeros(N, dtype=torch.int32)
    weights = []
    for expert in range(q.shape[0]):
        plain, order = sorted_columns(q[expert])
        apart = plain.data.unflatten(1, (matrices, -1)).transpose(0, 1).contiguous()
        packed = tuple(torch.ops.onednn.qlinear_prepack(matrix, None) for matrix in apart)
        own = None if offset is None else offset[expert]
        weights.append(Int8Weight(packed, scales[expert].unbind(), zeros, own, order))
    return weights


def unpacked_int8(weight: Int8Weight) -> torch.Tensor:
    """int8 [N, K] as ``QuantizedTensor`` has it, of what was packed."""
    data = torch.cat([matrix.to_dense() for matrix in weight.packed]).T  # oneDNN's: [columns, N]
    return stored_columns(data, weight.order, is_int4=False)


def int8_linear(rows: ByteRows, weight: Int8Weight, out: torch.Tensor) -> None:
    """Write rows times the transposed weight into ``out`` fp32 [M, N]."""
    if weight.order is not None:
        rows = rows.following(weight.order, 0 if weight.offset is None else len(weight.offset))
    y, *more = _products(rows.codes, weight)
    for part in more:
        y += part
    torch.mul(rows.joined(y), rows.scale, out=out)
    if weight.offset is not None:
        assert rows.sums is not None
        out.addmm_(rows.sums, weight.offset)


def _products(codes: torch.Tensor, weight: Int8Weight) -> Iterator[torch.Tensor]:
    """Codes [M, K] times each of the matrices: fp32 [M, N], scaled."""
    P, first = len(weight.packed), weight.scales[0]
    rest: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    if first.dim() == 1:
        pieces = (codes,) if P == 1 else codes.chunk(P, 1)
        for piece, packed, scale in zip(pieces, weight.packed, weight.scales, strict=True):
            yield _qlinear(piece, 1.0, 128, packed, scale, weight.zeros, *rest)
        return
    m, ones = len(first), torch.ones_like(first[0])
    for piece, packed, scale in zip(_apart(codes, P, m), weight.packed, weight.scales, strict=True):
        y = _qlinear(piece, 1.0, 128, packed, ones, weight.zeros, *rest)
        yield y.unflatten(0, (-1, m)).mul_(scale).sum(1)


def _apart(codes: torch.Tensor, P: int, m: int) -> torch.Tensor:
    """Codes [M, P * m * g] as [P, M * m, m * g]: each row m times, with one group each."""
    groups = codes.unflatten(1, (P, m, -1)).permute(1, 0, 3, 2)  # [P, M, g, m]
    apart = codes.new_full((P, codes.shape[0], m, m, groups.shape[2]), 128)
    apart.diagonal(dim1=2, dim2=3).copy_(groups)
    return apart.flatten(3).flatten(1, 2)


def int8_linears(rows: ByteRows, weights: Sequence[Int8Weight]) -> torch.Tensor:
    """[n, N] fp32: each of n weights times its row, or times the only one.

    As ``int8_linear`` n times, in few operations: between products that stream weights every step
    of the interpreter runs from cold caches, and takes many times as long.
    """
    n = len(weights)
    if not weights[0].by_row:
        out = rows.scale.new_empty(n, weights[0].zeros.shape[0])
        return one_by_one(int8_linear, rows, rows.rows, weights, out)
    codes = rows.codes.split(rows.parts) if rows.rows == n else (rows.codes,) * n
    scales = rows.scale.flatten().tolist()
    product = torch.ops.onednn.qlinear_pointwise.default
    rest: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    return rows.joined(
        torch.cat(
            [
                product(one, scale, 128, weight.packed[0], weight.scales[0], weight.zeros, *rest)
                for one, scale, weight in zip(
                    codes, scales if len(scales) == n else scales * n, weights, strict=True
                )
            ]
        )
    )
