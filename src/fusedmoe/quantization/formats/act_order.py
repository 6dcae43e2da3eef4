"""Act-order weights whose columns are sorted into groups and back, where they lie.

Sorted columns say so in ``group_index`` (``QuantizedTensor``): weights and table are rewritten
together, one expert at a time, and mean the same before and after.
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.formats.groups import columns_of, groups_of
from fusedmoe.quantization.formats.int4 import pack_nibbles, unpack_nibbles
from fusedmoe.quantization.tensor import QuantizedTensor


def order_by_group(w: QuantizedTensor) -> torch.Tensor | None:
    """int64 [e, K]: the places of act-order columns [e, N, K] in the order of their groups.

    None unless every expert's table gives every group as many columns, the same ones in every
    shard.
    """
    columns, index, scale = w.format.group.col, w.group_index, w.scale
    if index is None or scale is None or index.shape[-1] != columns * scale.shape[-1]:
        return None
    groups = groups_of(index[:, 0], columns)
    order = groups.argsort(dim=-1, stable=True)
    plain = torch.arange(index.shape[-1], device=index.device) // columns
    alike = torch.equal(index, index[:, :1].expand_as(index))
    whole = torch.equal(groups.gather(-1, order), plain.expand_as(order))
    return order if alike and whole else None


def sort_columns(w: QuantizedTensor) -> bool:
    """Sort the columns of act-order weights [e, N, K] into their groups, in place.

    Returns False and changes nothing where ``order_by_group`` is None. Waits for a GPU, so it is
    meant for loading.
    """
    order, index = order_by_group(w), w.group_index
    if order is None or index is None:
        return False
    for expert in (index[:, 0] >= 0).any(-1).nonzero().flatten().tolist():
        _rearrange(w[expert], order[expert], ~columns_of(index[expert, 0])[order[expert]])
    return True


def unsort_columns(w: QuantizedTensor) -> None:
    """Put sorted columns of one expert's weights [N, K] back where they belong."""
    index = w.group_index
    if index is not None and index.numel() and int(index.max()) < 0:
        places = columns_of(index[0]).argsort()
        _rearrange(w, places, places // w.format.group.col)


def taken_columns(data: torch.Tensor, order: torch.Tensor, *, is_int4: bool) -> torch.Tensor:
    """The numbers of one expert's weights [N, K] as they are stored, columns in ``order`` [K]."""
    return pack_nibbles(unpack_nibbles(data)[:, order]) if is_int4 else data[:, order]


def _rearrange(w: QuantizedTensor, order: torch.Tensor, index: torch.Tensor) -> None:
    """The columns [K] of an expert's weights in another order, with what ``index`` says of them."""
    assert w.group_index is not None
    with torch.inference_mode():  # the weights may be inference tensors
        w.data.copy_(taken_columns(w.data, order, is_int4=w.format.element == "int4"))
        w.group_index.copy_(index.expand_as(w.group_index))
