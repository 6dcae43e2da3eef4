"""Products with int4 weights on a CPU, in torch's own kernel, weights packed once.

torch's packed kernel takes and gives bf16. Rows that bf16 does not hold enter as two.
The kernel adds (8 - zero point) * scale in bf16; what that rounding loses is added afterwards.
Where bf16 does not hold the scales of groups, a second product brings what it lost of them: without
it a layer's error would be 4.3e-3 to 4.9e-3; so it is 3.0e-3 to 3.7e-3, as with scales in bf16.

M rows, N and K of a weight [N, K], g columns to a group, G = K / g.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from fusedmoe.experts.cpu_act_order import Order, sorted_columns, stored_columns
from fusedmoe.experts.cpu_run import one_by_one, sizes_in_parts
from fusedmoe.quantization.formats.int4 import OFFSET, pack_nibbles, unpack_nibbles
from fusedmoe.quantization.tensor import QuantizedTensor

_KERNEL_GROUPS = (256, 128, 64, 32)
_KERNEL_ROWS = 16
_KERNEL_BLOCK = 64


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


class FloatRows(NamedTuple):
    """Rows in bf16 [2 * M, K], each followed by what its rounding lost ([M, K] if that is nothing).

    ``sums`` fp32 [M, G] over groups of columns, where zero points need them.
    """

    x: torch.Tensor
    sums: torch.Tensor | None = None
    parts: int = 2

    @property
    def rows(self) -> int:
        """M"""
        return self.x.shape[0] // self.parts

    def split(self, counts: int | Sequence[int]) -> list[FloatRows]:
        x = self.x.split(sizes_in_parts(counts, self.parts))
        sums = (None,) * len(x) if self.sums is None else self.sums.split(counts)
        return [FloatRows(*pieces, self.parts) for pieces in zip(x, sums, strict=True)]

    def following(self, order: Order, G: int) -> FloatRows:
        """The rows in the order of an expert's columns, with sums over G groups unless G is 0."""
        x, sums = self.x[:, order.columns], None
        if G:
            whole = x.float().unflatten(0, (-1, self.parts)).sum(1)
            sums = whole.unflatten(1, (G, -1)).sum(-1)
        return FloatRows(x, sums, self.parts)


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
    ``order`` is that of the columns where rows have to follow it.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    group: int
    rest: torch.Tensor | None
    offset: torch.Tensor | None
    factor: torch.Tensor | None
    order: Order | None = None


def int4_weights(q: QuantizedTensor) -> list[Int4Weight]:
    """Each expert of an int4 tensor with scales per row or group of columns.

    Each part lies in one allocation for all: between the large tensors that packing needs for a
    moment, many small ones would leave holes that no later expert fits into.
    """
    assert q.scale is not None
    (e, N, K), G, g = q.shape, q.scale.shape[-1], q.format.group.col
    group = next(size for size in _KERNEL_GROUPS if (K if g < 0 else g) % size == 0)
    by_row = G == 1
    packed = torch.empty_like(q.data)
    scales = q.data.new_empty(e, K // group, N, 2, dtype=torch.bfloat16)
    rounded = not by_row and any(bool((one != one.bfloat16()).any()) for one in q.scale)
    rest = torch.empty_like(scales) if rounded else None
    floats = partial(q.data.new_empty, dtype=torch.float32)
    # Rows with one scale add small integers, which are exact, and need no offsets.
    offset = None if q.zero_point is None or by_row else floats((e, G, N))
    factor = floats((e, N)) if by_row else None
    weights = []
    for expert in range(e):
        plain, order = sorted_columns(q[expert])
        weights.append(
            Int4Weight(
                packed[expert],
                scales[expert],
                group,
                None if rest is None else rest[expert],
                None if offset is None else offset[expert],
                None if factor is None else factor[expert],
                order,
            )
        )
        _fill(weights[-1], plain)
    return weights


def _fill(weight: Int4Weight, q: QuantizedTensor) -> None:
    assert q.scale is not None
    scale = q.scale.float().T  # [G, N]
    if weight.factor is not None:
        weight.factor.copy_(scale[0])
        scale = torch.ones_like(scale)
    none = added = torch.zeros_like(scale)
    if q.zero_point is not None:
        exact = (OFFSET - q.zero_point.float()).T * scale
        added = exact.bfloat16().float()
        if weight.offset is not None:
            weight.offset.copy_(exact - added)
    for target, first, second in (
        (weight.scales, scale, added),
        (weight.rest, scale - scale.bfloat16().float(), none),
    ):
        if target is not None:
            pairs = torch.stack([first, second], -1)
            target.copy_(pairs.repeat_interleave(target.shape[0] // pairs.shape[0], 0))
    codes = unpack_nibbles(q.data).int().contiguous()
    weight.packed.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))


def unpacked_int4(weight: Int4Weight) -> torch.Tensor:
    """uint8 [N, K / 2] as ``QuantizedTensor`` has it, of what was packed.

    Whole blocks of 64 rows lie column by column, row r in the low nibble of a byte that has row
    r + 32 in its high one; the rows after them likewise, but neighbours share a byte.
    """
    N, half = weight.packed.shape
    whole = N // _KERNEL_BLOCK * _KERNEL_BLOCK
    codes = weight.packed.new_empty(N, 2 * half)
    blocks = weight.packed[:whole].view(whole // _KERNEL_BLOCK, 2 * half, _KERNEL_BLOCK // 2)
    pairs = torch.stack([blocks & 15, blocks >> 4], -2)  # [blocks, K, 2, 32]
    codes[:whole] = pairs.flatten(-2).transpose(1, 2).reshape(whole, 2 * half)
    if whole < N:
        codes[whole:] = unpack_nibbles(weight.packed[whole:].view(2 * half, -1)).T
    return stored_columns(pack_nibbles(codes), weight.order, is_int4=True)


def int4_linear(rows: FloatRows, weight: Int4Weight, out: torch.Tensor) -> None:
    """Write rows times the transposed weight into ``out`` [M, N]."""
    if weight.order is not None:
        rows = rows.following(weight.order, 0 if weight.offset is None else len(weight.offset))
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows.x, weight.packed, weight.group, weight.scales
    )
    if rows.parts == 2:
        y = y.float().unflatten(0, (-1, 2)).sum(1)
    if weight.rest is not None:
        high = rows.x[:: rows.parts].contiguous()  # x's first bits are enough for it
        y = y.float() + torch.ops.aten._weight_int4pack_mm_for_cpu(
            high, weight.packed, weight.group, weight.rest
        )
    if weight.offset is not None:
        assert rows.sums is not None
        y = torch.addmm(y.float(), rows.sums, weight.offset)
    if weight.factor is not None:
        y = y * weight.factor
    out.copy_(y)


def int4_linears(rows: FloatRows, weights: Sequence[Int4Weight]) -> torch.Tensor:
    """[n, N] fp32: each of n weights times its row, or times the only one; see ``int8_linears``."""
    n = len(weights)
    if any(part is not None for w in weights for part in (w.rest, w.offset, w.factor, w.order)):
        out = rows.x.new_empty(n, weights[0].scales.shape[1], dtype=torch.float32)
        return one_by_one(int4_linear, rows, rows.rows, weights, out)
    pieces = rows.x.split(rows.parts) if rows.rows == n else (rows.x,) * n
    product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    y = torch.cat(
        [
            product(one, weight.packed, weight.group, weight.scales)
            for one, weight in zip(pieces, weights, strict=True)
        ]
    ).float()
    return y if rows.parts == 1 else y.unflatten(0, (n, 2)).sum(1)
