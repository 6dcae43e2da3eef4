"""Integer weights on a CPU as their products read them: in the place of the numbers, or beside."""

from __future__ import annotations

import logging

import torch

from fusedmoe.experts.copies import Source, room_for
from fusedmoe.experts.cpu_int4 import int4_weights, unpacked_int4
from fusedmoe.experts.cpu_int8 import int8_weights, unpacked_int8
from fusedmoe.experts.packed_weight import Packed, can_pack, pack, packed_of, unpack
from fusedmoe.quantization.desc import FusedMoEQuantDesc
from fusedmoe.quantization.formats.act_order import order_by_group
from fusedmoe.quantization.tensor import QuantizedTensor

_log = logging.getLogger(__name__)


def _sources(part: FusedMoEQuantDesc) -> tuple[Source, ...]:
    parts = (part.scale, part.zp, part.group_index)
    return tuple(Source.of(tensor) for tensor in parts if tensor is not None)


def current(weight: torch.Tensor, part: FusedMoEQuantDesc, copy: Packed | None) -> Packed | None:
    """What was packed of ``weight``, or the ``copy`` beside it; None where that is out of date.

    Once nothing else shares the numbers' memory, a copy replaces them.
    """
    held, sources = packed_of(weight), _sources(part)
    if held is not None:
        return held if held.sources == sources else None
    beside = Source.of(weight), *sources
    if copy is None or copy.sources != beside:
        return None
    if can_pack(weight):
        copy.sources = sources
        if not pack(weight, copy):
            copy.sources = beside
    return copy


def packed_or_copy(q: QuantizedTensor, part: FusedMoEQuantDesc) -> Packed | None:
    """Pack ``q.data`` in its place and return None or, where its memory is shared, return a packed
    copy if there is room. Act-order columns that cannot be sorted stay as they are.
    """
    weight, sources = q.data, _sources(part)
    if current(weight, part, None) is not None:
        return None
    unpack(weight)
    if q.group_index is not None and order_by_group(q) is None:
        return None
    if not can_pack(weight) and not room_for(weight.nbytes):
        _log.info("no memory to spare for packed expert weights: they are dequantized instead")
        return None
    if q.format.element == "int4":
        made = Packed(int4_weights(q), unpacked_int4, sources)
    else:
        made = Packed(int8_weights(q), unpacked_int8, sources)
    if pack(weight, made):
        return None
    made.sources = (Source.of(weight), *sources)
    return made
