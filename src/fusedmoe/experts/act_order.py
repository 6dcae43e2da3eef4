"""Act-order weights with their columns sorted into groups: a copy that ordinary kernels read.

Where the group of a column comes from a table, every number has to fetch its own scale. Sorted by
group, the columns are those of the plain format, and what moves is the rows that meet them:

* the columns of w2 are the features of w1: its rows are sorted with them, which costs nothing;
* the columns of w1 are those of x: each slot's row is gathered in the order of its expert.

Gathering moves T * K rows of x, a few microseconds for few tokens, where fetching scales takes a
load per weight. Gate and up of a checkpoint have one order, for they see the same rows; where they
have not, and where a rank's columns are no whole groups, the table is read instead.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.kernels.grouped_gemm_quantized import to_planes
from fusedmoe.quantization.formats.int4 import pack_nibbles, unpack_nibbles
from fusedmoe.quantization.tensor import QuantizedTensor

_LEAST_GROUP = 16
RESERVED_SHARE = 0.25
"""Of a GPU's memory: what the copy leaves free."""


def room_on(device: torch.device, size: int) -> bool:
    """Whether a copy of ``size`` bytes leaves a quarter of the GPU's memory free; True elsewhere.

    Memory that torch holds and does not use counts as free.
    """
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + held - size >= RESERVED_SHARE * total


def sorted_operands(operands: Operands, old: Operands | None = None) -> Operands | None:
    """The same layer as plain formats, with ``order`` for x; None where nothing can be sorted.

    Weights are written over those of ``old``, an earlier copy of the same layer, where these are
    alike: there is never a third. Waits for the GPU: it is for loading.
    """
    w1, w2 = operands.w1, operands.w2
    down, up = _order(w2), _order(w1)
    if w1.format.group.row != 1 or w1.format.element not in ("int4", "int8"):
        down = None
    if down is None and up is None:
        return None
    features = None if down is None else down.long()
    rows = None if features is None else _rows(features, w1)
    bias = operands.w1_bias
    if bias is not None and rows is not None:
        bias = bias.gather(1, rows)
    order = None
    if up is not None:
        even = w1.format.element == "int4"
        order = (to_planes(up) if even else up).to(torch.int32).contiguous()
    return replace(
        operands,
        w1=_rearranged(w1, rows, up, None if old is None else old.w1.data),
        w2=_rearranged(w2, None, features, None if old is None else old.w2.data),
        w1_bias=bias,
        order=order,
    )


def in_place_of(old: Operands | None, new: Operands) -> Operands:
    """``new``, written into the tensors of ``old`` where these are alike: captured graphs go on
    reading them."""
    if old is None:
        return new
    pairs = list(zip(_tensors(old), _tensors(new), strict=True))
    for mine, theirs in pairs:
        if mine is None or theirs is None:
            if mine is not theirs:
                return new
        elif not _alike(mine, theirs):
            return new
    with torch.inference_mode():  # where the old ones may have been made
        for mine, theirs in pairs:
            if mine is not None and theirs is not None and mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)
    return old


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _tensors(operands: Operands) -> list[torch.Tensor | None]:
    both = operands.w1, operands.w2
    parts = [part for w in both for part in (w.data, w.scale, w.zero_point, w.group_index)]
    return [*parts, operands.w1_bias, operands.order]


def _order(w: QuantizedTensor) -> torch.Tensor | None:
    """int64 [e, K]: the columns by their groups; None for plain formats and for tables that do not
    give every group as many columns, the same ones in every shard."""
    index, columns = w.group_index, w.format.group.col
    if index is None or columns < _LEAST_GROUP or columns & (columns - 1):
        return None
    order = index[:, 0].argsort(dim=-1, stable=True)
    plain = torch.arange(index.shape[-1], device=index.device) // columns
    assert w.scale is not None
    regular = (
        plain.numel() == columns * w.scale.shape[-1]
        and torch.equal(index, index[:, :1].expand_as(index))
        and torch.equal(index[:, 0].gather(-1, order), plain.int().expand(order.shape))
    )
    return order if regular else None


def _rows(features: torch.Tensor, w: QuantizedTensor) -> torch.Tensor:
    """int64 [e, N]: the rows of ``w`` whose shards have their features in the order [e, N / S]."""
    shard = torch.arange(w.shards, device=features.device)
    if w.interleaved:
        return (features[:, :, None] * w.shards + shard).flatten(1)
    return (features[:, None, :] + shard[:, None] * features.shape[1]).flatten(1)


def _rearranged(
    w: QuantizedTensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    into: torch.Tensor | None,
) -> QuantizedTensor:
    """A copy with rows [e, N] and columns [e, K] in these orders, one expert at a time; columns by
    their groups make the format a plain one. Its data are ``into`` where that fits."""
    if rows is None and columns is None:
        return w
    packed = w.format.element == "int4"
    data = into
    if data is None or not _alike(data, w.data) or data.data_ptr() == w.data.data_ptr():
        data = torch.empty_like(w.data)
    with torch.inference_mode():  # where the old ones may have been made
        for expert, stored in enumerate(w.data):
            one = stored if rows is None else stored[rows[expert]]
            if columns is not None:
                one = unpack_nibbles(one) if packed else one
                one = one[:, columns[expert]]
                one = pack_nibbles(one) if packed else one
            data[expert].copy_(one)

    def by_row(part: torch.Tensor | None) -> torch.Tensor | None:
        if part is None or rows is None:
            return part
        return part.gather(1, rows[:, :, None].expand(part.shape))

    plain = columns is not None
    return replace(
        w,
        data=data,
        scale=by_row(w.scale),
        zero_point=by_row(w.zero_point),
        group_index=None if plain else w.group_index,
        format=replace(w.format, act_order=w.format.act_order and not plain),
    )
