"""Act-order weights on a CPU: packed with their columns sorted into groups, which rows follow.

The columns lie as in any other format then, and each expert's rows are gathered as its columns are.
Where gate and up differ in order, or a rank's columns are no whole groups, nothing is packed.

M rows, N and K of a weight [N, K], g columns to a group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from fusedmoe.quantization.formats.act_order import taken_columns
from fusedmoe.quantization.formats.groups import columns_of, groups_of
from fusedmoe.quantization.tensor import QuantizedTensor


class Order(NamedTuple):
    """How packed columns lie, int64 [K] both.

    ``columns``: which column of x meets each; ``places``: where the number of each place of the
    weight as it is stored has gone.
    """

    columns: torch.Tensor
    places: torch.Tensor


def sorted_columns(q: QuantizedTensor) -> tuple[QuantizedTensor, Order | None]:
    """One expert [N, K] in the plain format, and how its columns lie; None: as they did."""
    if q.group_index is None:
        return q, None
    index, g = q.group_index[0], q.format.group.col
    order = groups_of(index, g).argsort(stable=True)
    plain = replace(q.format, act_order=False)
    data = taken_columns(q.data, order, is_int4=q.format.element == "int4")
    lie = Order(columns_of(index)[order], order.argsort())
    return replace(q, format=plain, group_index=None, data=data), lie


def stored_columns(data: torch.Tensor, order: Order | None, *, is_int4: bool) -> torch.Tensor:
    """``data`` of sorted columns as it was before."""
    return data if order is None else taken_columns(data, order.places, is_int4=is_int4)
