"""Act-order weights whose columns are sorted into groups and back, where they lie.

Sorted columns say so in ``group_index`` (``QuantizedTensor``): weights and table are rewritten
together, one expert at a time, and mean the same before and after.
"""

from __future__ import annotations

import torch

from fusedmoe.quantization.formats.groups import columns_of, groups_of
from fusedmoe.quantization.formats.int4 import pack_nibbles, unpack_nibbles
from fusedmoe.quantization.tensor import QuantizedTensor


def sort_columns(w: QuantizedTensor) -> bool:
    """Sort the columns of act-order weights [e, N, K] into their groups; whether they lie so now.

    False, and nothing changes, unless every expert's table gives every group as many columns, the
    same ones in every shard. Waits for a GPU: it is for loading.
    """
    columns, index, scale = w.format.group.col, w.group_index, w.scale
    if index is None or scale is None or index.shape[-1] != columns * scale.shape[-1]:
        return False
    groups = groups_of(index[:, 0], columns)
    order = groups.argsort(dim=-1, stable=True)
    plain = torch.arange(index.shape[-1], device=index.device) // columns
    if not (
        torch.equal(index, index[:, :1].expand_as(index))
        and torch.equal(groups.gather(-1, order), plain.expand(order.shape))
    ):
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


def _rearrange(w: QuantizedTensor, order: torch.Tensor, index: torch.Tensor) -> None:
    """The columns [K] of an expert's weights in another order, with what ``index`` says of them."""
    assert w.group_index is not None
    packed = w.format.element == "int4"
    with torch.inference_mode():  # where the weights may have been made
        one = (unpack_nibbles(w.data) if packed else w.data)[:, order]
        w.data.copy_(pack_nibbles(one) if packed else one)
        w.group_index.copy_(index.expand_as(w.group_index))
