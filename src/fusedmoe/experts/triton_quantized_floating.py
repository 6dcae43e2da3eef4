"""The two products of the quantized experts where rows are in floating point.

Rows come as they are, or are rounded to their format and back ("emulated") before each product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.gather_columns import gather_columns
from fusedmoe.kernels.grouped_gemm_packed import is_packed, packed_gemm
from fusedmoe.kernels.grouped_gemm_quantized import NIBBLES, TABLES, quantized_gemm, to_planes
from fusedmoe.kernels.round_rows import round_rows
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import (
    QuantizedTile,
    QuantizedTiles,
    packed_tile,
    weight_only_tiles,
)

_MANY_TOKENS = 512


def floating_products(
    x: torch.Tensor,
    operands: Operands,
    act: torch.Tensor,
    rows: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tiles: QuantizedTiles,
    given: tuple[dict[str, Any], dict[str, Any], dict[str, Any]],
    batch_invariant: bool,
) -> None:
    """Both products with rows in floating point, as they come or rounded to a format and back.

    Arguments as ``two_gemms`` has them; ``given``: those of the first product, of the second, and
    which slots count.
    """
    first, second, live = given
    w1, w2 = operands.w1, operands.w2
    # What writes rows writes them in the order in which weights are met.
    a1, a2, places = operands.a1, operands.a2, operands.places
    planes = _in_planes(w2) and places is None
    many = _in_planes(w1) and (batch_invariant or x.shape[0] >= _MANY_TOKENS)
    if operands.order is not None:
        a = x if a1 is None else round_rows(x, a1, operands.a1_scale)
        # The second product's rows are written after the first has read these.
        room = rows.flatten().view(x.dtype)[: rows.numel()].view(rows.shape)
        a = gather_columns(a, operands.order, room, live["topk_ids"], live["expert_map"])
        first, many = first | {"top_k": 1}, _in_planes(w1)
    elif a1 is not None:
        a = round_rows(x, a1, operands.a1_scale, planes=many)
    else:
        a = to_planes(x) if many else x
    if a2 is None:
        _product(a, w1, act, blocks, tiles.gemm1, (many, planes), c_places=places, **first)
    else:
        _product(a, w1, act, blocks, tiles.gemm1, (many, False), **first)
        act = round_rows(
            act, a2, operands.a2_scale, planes=planes, num_local_experts=w1.shape[0], **live
        )
        if places is not None:
            order = places.argsort(-1).to(torch.int32)
            room = torch.empty_like(act)
            act = gather_columns(act, order, room, live["topk_ids"], live["expert_map"])
    _product(act, w2, rows, blocks, tiles.gemm2, (_in_planes(w2), False), **second)


def _in_planes(w: QuantizedTensor) -> bool:
    """Whether rows meet ``w`` sooner with the columns of even number first."""
    return w.format.element in NIBBLES and not is_packed(w.format)


def _product(
    a: torch.Tensor,
    w: QuantizedTensor,
    c: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tile: QuantizedTile,
    planes: tuple[bool, bool],
    **rest: Any,
) -> None:
    """By the kernel that reads ``w``; ``planes``: those of a and of c."""
    if is_packed(w.format):
        packed_gemm(a, w, c, blocks, tile, c_planes=planes[1], **rest)
    else:
        quantized_gemm(a, w, c, blocks, tile, a_planes=planes[0], c_planes=planes[1], **rest)


def floating_tiles(operands: Operands, T: int, K: int, batch_invariant: bool) -> QuantizedTiles:
    """Tiles for T tokens of K picks."""
    (e, H, I), both = operands.w2.shape, (operands.w1, operands.w2)  # noqa: E741
    slow = any(is_packed(w.format) or w.format.element == "nf4" for w in both)
    bits = 4 if both[0].format.element in NIBBLES and not slow else 8
    tiles = weight_only_tiles(
        T, K, e, H, I, bits, operands.columns, batch_invariant=batch_invariant
    )
    return QuantizedTiles(*(_fitting(w, t) for w, t in zip(both, tiles, strict=True)))


def _fitting(w: QuantizedTensor, tile: QuantizedTile) -> QuantizedTile:
    if is_packed(w.format):
        return packed_tile(tile, w.format.element)
    depth, group = tile.depth, w.format.group.col
    if w.format.element in TABLES:
        depth = min(depth, 128)  # deeper, table words take too many registers
    if w.format.element == "nf4" and group > 0:
        while depth > 16 and group % depth:
            depth //= 2  # no more than a group, so that its scale meets the sum of a step
    return replace(tile, depth=depth)
