"""The two products of the quantized experts where rows are in floating point.

Rows come as they are, or are rounded to their format and back ("emulated") before each product.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from fusedmoe.experts.quantized_operands import Operands, SlotProducts
from fusedmoe.kernels.column_orders import SIXES, UNITS, order_for, ordered
from fusedmoe.kernels.grouped_gemm_packed import is_packed
from fusedmoe.kernels.grouped_gemm_quantized import (
    NIBBLES,
    TABLES,
    QuantizedProduct,
    quantized_gemm,
)
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import (
    LEAST_ORDERED_SLOTS,
    QuantizedTile,
    QuantizedTiles,
    packed_tile,
    weight_only_tiles,
)

_SOME_TOKENS, _MANY_TOKENS = 8, 512
_ROOMY_BYTES = 200 << 10


def floating_products(layer: SlotProducts) -> None:
    """Both products of rows in floating point, which come as they are or are rounded to a format
    and back."""
    x, operands, act, rows, blocks, tiles, top_k, *_ = layer
    w1, w2, (first, second) = operands.w1, operands.w2, operands.steps
    routed, many = (layer.ids, layer.expert_map), x.shape[0] >= _MANY_TOKENS
    # Steps that write rows write their columns in the order in which the weights take them.
    x_order, act_order = _order(w1, x.shape[1], tiles.gemm1), _order(w2, w2.shape[2], tiles.gemm2)
    pays = layer.batch_invariant or many or (x_order == SIXES and x.shape[0] >= _SOME_TOKENS)
    if first.columns is None and not pays:
        x_order = ""
    # The second product's rows are written after the first has read these.
    a = first.taken(x, w1, *routed, order=x_order, room=rows)
    a = ordered(a, x_order) if first.none else a
    scattered = second.columns is not None and second.key is None and not many
    up = QuantizedProduct(a, w1, act, blocks, tiles.gemm1, first.top_k(top_k), *layer.epilogue)
    quantized_gemm(
        up,
        a_ordered=x_order != "",
        c_order=act_order if second.none else "",
        c_places=operands.places if scattered else None,
    )
    if not scattered:
        act = second.taken(act, w2, *routed, order=act_order, num_local_experts=w1.shape[0])
    down = QuantizedProduct(act, w2, rows, blocks, tiles.gemm2, 1, operands.w2_bias)
    quantized_gemm(down, a_ordered=act_order != "")


def _order(w: QuantizedTensor, D: int, tile: QuantizedTile) -> str:
    """The order in which rows' columns meet ``w``. Few slots meet floats of six bits as they come,
    because steps in their order are short."""
    order = order_for(w.format, D)
    return "" if order == UNITS and tile.slots < LEAST_ORDERED_SLOTS else order


def floating_tiles(operands: Operands, T: int, K: int, batch_invariant: bool) -> QuantizedTiles:
    """Tiles for T tokens of K picks."""
    (e, H, I), both = operands.w2.shape, (operands.w1, operands.w2)  # noqa: E741
    slow = any(is_packed(w.format) or w.format.element == "nf4" for w in both)
    bits = 4 if both[0].format.element in NIBBLES and not slow else 8
    roomy = _is_roomy(operands.w1.data.device)
    tiles = weight_only_tiles(
        *(T, K, e, H, I, bits, operands.columns), batch_invariant=batch_invariant, roomy=roomy
    )
    return QuantizedTiles(*(_fitting(w, t, roomy) for w, t in zip(both, tiles, strict=True)))


def _fitting(w: QuantizedTensor, tile: QuantizedTile, roomy: bool) -> QuantizedTile:
    if is_packed(w.format):
        return packed_tile(tile, w.format.element, roomy=roomy)
    depth, group = tile.depth, w.format.group.col
    if w.format.element in TABLES:
        depth = min(depth, 128)  # deeper steps need too many registers for table words
    if w.format.element == "nf4" and group > 0:
        while depth > 16 and group % depth:
            depth //= 2  # at most a group, whose scale multiplies the sum of a step
    return replace(tile, depth=depth)


@lru_cache
def _is_roomy(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) >= _ROOMY_BYTES
