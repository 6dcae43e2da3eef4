"""Act-order weights with their columns sorted into groups, where they lie.

Where the group of a column comes from a table, every number has to fetch its own scale. Sorted by
group, the columns are those of the plain format, and what moves is the rows that meet them:

* the columns of w1 are those of x: each slot's row is gathered in the order of its expert;
* the columns of w2 are the features of w1: few rows of its product are written in the order in
  which w2 reads them, which costs nothing, and many gathered, for scattered bytes are slower.

Gathering moves T * K rows, a few microseconds for few tokens, where fetching scales takes a load
per weight. There is no copy: the weights and their ``group_index`` are rewritten together, one
expert at a time, so that they say what they are wherever they go. Gate and up of a checkpoint have
one order, for they see the same rows; where they have not, and where a rank's columns are no whole
groups, the columns stay and the table is read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe.experts.quantized_operands import TABLES, Operands
from fusedmoe.kernels.column_orders import order_for, ordered
from fusedmoe.quantization.formats.act_order import sort_columns
from fusedmoe.quantization.formats.groups import columns_of, groups_of
from fusedmoe.quantization.tensor import QuantizedTensor

_LEAST_GROUP = 16


def sorted_operands(operands: Operands) -> Operands:
    """The same weights, in plain formats where their columns can be sorted, which is done in place,
    and the orders that rows then follow. Waits for a GPU, so it is meant for loading."""
    for name in ("w1", "w2"):
        w: QuantizedTensor = getattr(operands, name)
        columns, index = w.format.group.col, w.group_index
        if index is None:
            continue
        sortable = columns >= _LEAST_GROUP and columns & (columns - 1) == 0
        if sortable and sort_columns(w):
            fmt = replace(w.format, act_order=False)
            order = columns_of(index[:, 0])
            order = ordered(order, order_for(fmt, order.shape[1]))
            plain = replace(w, format=fmt, group_index=None)
            operands = replace(operands, **{name: plain}, **_followed(name, order))  # type: ignore[arg-type]
        elif bool((index < 0).any()):  # experts that were sorted on the rank they came from
            operands = _as_it_lies(operands, name)
    return operands


def as_they_lie(operands: Operands) -> Operands:
    """Act-order weights that were not examined: their rows are moved as if columns were sorted, and
    every number fetches its scale. Waits for nothing."""
    for name in ("w1", "w2"):
        if getattr(operands, name).group_index is not None:
            operands = _as_it_lies(operands, name)
    return operands


def _as_it_lies(operands: Operands, name: str) -> Operands:
    w: QuantizedTensor = getattr(operands, name)
    assert w.group_index is not None
    groups = groups_of(w.group_index, w.format.group.col).to(torch.int32).contiguous()
    follow = _followed(name, columns_of(w.group_index[:, 0]))
    return replace(operands, **{name: replace(w, group_index=groups)}, **follow)  # type: ignore[arg-type]


def _followed(name: str, order: torch.Tensor) -> dict[str, torch.Tensor]:
    """How rows follow columns in ``order`` [e, K]: x is gathered, the rest is written there or
    gathered, too."""
    order = order.to(torch.int32).contiguous()
    if name == "w1":
        return {"order": order}
    return {"down_order": order, "places": order.argsort(-1).to(torch.int32).contiguous()}


def keep_tables(old: Operands | None, new: Operands) -> Operands:
    """``new``, its tables written over those of ``old`` where these are alike: captured graphs go
    on reading them."""
    if old is None:
        return new
    kept: dict[str, torch.Tensor] = {}
    for name in TABLES:
        mine, theirs = getattr(old, name), getattr(new, name)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            continue
        if mine.device == theirs.device:
            with torch.inference_mode():  # the old one may be an inference tensor
                kept[name] = mine.copy_(theirs)
    return replace(new, **kept)  # type: ignore[arg-type]
