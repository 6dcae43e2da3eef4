"""The experts of a large batch on Hopper with both operands in 8 bits, bound by the products.

The whole layer but routing: fp8 by fp8 and int8 by int8. Device code:
``kernels/triton/hopper_fp8_prefill.py`` (Gluon).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe.kernels.align import align_local_slots
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.grouped_gemm_quantized_w8a8 import w8a8_gemm_reference
from fusedmoe.kernels.hopper_decode import check_biases
from fusedmoe.kernels.hopper_prefill import PREFILL_BLOCK, align_rows, prefill_rows
from fusedmoe.kernels.hopper_w8a8 import STEP, unmet_by_pairs
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum_reference
from fusedmoe.kernels.quantize import STORED, quantize_rows_reference, room_for_rows
from fusedmoe.kernels.tensor_checks import (
    check_contiguous,
    check_quantized_rows,
    check_tensors,
)
from fusedmoe.quantization.keys import PER_TENSOR, GroupShape, QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedPrefillTiles, QuantizedTile, prefill_tiles

TILE_ROWS = 128
ALIGNED_BYTES = 16  # what a gather copies at once


def unmet_by_prefill(
    w1: QuantizedTensor, w2: QuantizedTensor, keys: tuple[QuantKey, QuantKey]
) -> str | None:
    """Why the kernels cannot multiply these weights with rows of these keys, None: they can."""
    reason = unmet_by_pairs((w1, keys[0]), (w2, keys[1]))
    if reason is not None:
        return reason
    for w in (w1, w2):
        rows, columns = w.format.group
        if columns > 0 and (rows % TILE_ROWS or w.format.element != "e4m3"):
            return f"wants fp8 scales per {TILE_ROWS} weight rows, not {w.format.name}"
        if w.scale is None or not w.scale.is_contiguous():
            return "wants scales that are contiguous"
    if keys[1].group_shape == PER_TENSOR and not keys[1].static:
        return f"cannot know one scale for all rows of w2's input, {keys[1]}, in time"
    return None


def rounds_by_tile(key: QuantKey, tiles: QuantizedPrefillTiles) -> bool:
    """Whether rows of w2's input have a scale per 128 columns, not only where ``key`` asks for it:
    rows that would share one too, of int8 where ``tiles`` say so. A tile of act holds 128 of a
    row's columns, so a scale per row would be known only after the launch, at the price of a pass
    over act. Finer scales round no worse, and every 128 columns of fp8 are added to the sums in
    fp32 anyway."""
    dynamic = not key.static and (key.dtype != torch.int8 or tiles.finely)
    return key.group_shape.col == STEP or dynamic


def fp8_prefill(
    layer: LayerTensors[QuantizedTensor],
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    tiles: QuantizedPrefillTiles | None = None,
    x_scale: torch.Tensor | None = None,
) -> None:
    """Run a layer of many slots: x and out bf16, weights in e4m3 or int8; scratch act [P, I] and
    y [P, H] bf16, P = ``prefill_rows``.

    ``keys`` say how the rows entering w1 and w2 are quantized, ``scales`` fp32 [1] belong to static
    ones. ``x_scale``: x is rounded already, as ``quantize_rows`` does it. Raises ValueError for
    pairs that the kernels cannot multiply and for tensors that do not fit.
    """
    x, w1, w2, topk_ids = layer.x, layer.w1, layer.w2, layer.topk_ids
    reason = unmet_by_prefill(w1, w2, keys)
    if reason is not None:
        raise ValueError(f"the Hopper kernel {reason}")
    _check(layer, keys[0], x_scale)
    check_biases(layer)
    if not x.is_cuda:
        fp8_prefill_reference(layer, keys, scales, tiles, x_scale)
        return
    from fusedmoe.kernels.triton.hopper_fp8_prefill import prefill

    R, (e, H, I) = topk_ids.numel(), w2.shape  # noqa: E741
    if R == 0:
        return
    room = None
    if x_scale is None and (keys[0].static or keys[0].group_shape != PER_TENSOR):
        room = room_for_rows(x, keys[0], scales[0])
    x, tables, arrivals = align_rows(x, topk_ids, e, layer.expert_map)
    tiles = tiles or prefill_tiles(R, layer.num_experts, H, I, w1.format.element)
    room = room if arrivals is None else None
    prefill(layer._replace(x=x), keys, scales, tables, tiles, x_scale, arrivals, room)


def fp8_prefill_reference(
    layer: LayerTensors[QuantizedTensor],
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    tiles: QuantizedPrefillTiles | None = None,
    x_scale: torch.Tensor | None = None,
) -> None:
    """The definition, in plain torch; rows of act and y are slots."""
    x, w1, w2, topk_weights, topk_ids, out, act, y = layer[:8]
    (T, K), (e, H, I) = topk_ids.shape, w2.shape  # noqa: E741
    R = T * K
    tiles = tiles or prefill_tiles(R, layer.num_experts, H, I, w1.format.element)
    tables = align_local_slots(topk_ids, PREFILL_BLOCK, e, layer.expert_map, whole_blocks=True)
    tile = QuantizedTile(128, PREFILL_BLOCK, STEP, 1, 4, 4)
    rows, scale = x, x_scale
    if scale is None:
        rows, scale = quantize_rows_reference(x, keys[0], scales[0])
    exact = torch.zeros(R, I, dtype=torch.float32, device=x.device)
    epilogue = layer.w1_bias, layer.activation, layer.activation_config
    first = QuantizedProduct(rows, w1, exact, tables, tile, K, *epilogue)
    w8a8_gemm_reference(first, scale, keys[0])
    act[:R] = exact.to(act.dtype)
    key = keys[1]
    if rounds_by_tile(key, tiles):
        key = replace(key, group_shape=GroupShape(1, STEP))
    in_the_epilogue = key.static or rounds_by_tile(key, tiles)
    rows, scale = quantize_rows_reference(exact if in_the_epilogue else act[:R], key, scales[1])
    y[:R] = 0
    second = QuantizedProduct(rows, w2, y[:R], tables, tile, 1, layer.w2_bias)
    w8a8_gemm_reference(second, scale, key)
    moe_fused_mul_sum_reference(
        y[:R].view(T, K, H), topk_weights, out, topk_ids, layer.expert_map, num_local_experts=e
    )


def _check(
    layer: LayerTensors[QuantizedTensor], key: QuantKey, x_scale: torch.Tensor | None
) -> None:
    x, w1 = layer.x, layer.w1
    (e, H, I), T = layer.w2.shape, layer.topk_ids.shape[0]  # noqa: E741
    shards = 2 if layer.activation.is_gated else 1
    if w1.shape != (e, shards * I, H) or w1.shards != shards:
        raise ValueError(
            f"w1 is {w1.shape} of {w1.shards} shards, expected {(e, shards * I, H)} of {shards}"
        )
    dtype = torch.bfloat16 if x_scale is None else STORED[key.dtype]
    check_quantized_rows(layer, prefill_rows(layer.topk_ids.numel(), e), x_dtype=dtype)
    of_x = (T, -(-H // max(key.group_shape.col, 1)))
    check_tensors((("x_scale", x_scale, of_x, torch.float32),))
    check_contiguous(x=None if x_scale is None else x, x_scale=x_scale)
    if x_scale is not None and x.data_ptr() % ALIGNED_BYTES:
        raise ValueError(f"rounded x must lie at a multiple of {ALIGNED_BYTES} bytes")
