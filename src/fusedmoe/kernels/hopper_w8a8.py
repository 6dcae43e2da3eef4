"""The experts of a small batch on Hopper with both operands in 8 bits, at the speed of memory.

The whole layer but routing. Device code: ``kernels/triton/hopper_w8a8.py`` (Gluon). The definition
is the weighted sum of ``w8a8_gemm_reference`` twice.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.activation import NO_ACTIVATION
from fusedmoe.kernels.align_quantize import align_and_quantize
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.grouped_gemm_quantized_w8a8 import w8a8_gemm_reference
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum_reference
from fusedmoe.kernels.quantize import STORED, QuantizedRows, quantize_rows
from fusedmoe.kernels.quantized_checks import check_layer, unmet_by_weights
from fusedmoe.kernels.tensor_checks import check_contiguous, check_quantized_rows
from fusedmoe.quantization.keys import PER_TENSOR, PER_TOKEN, QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.hopper_tiles import DirectTiles
from fusedmoe.tuning.quantized_tiles import QuantizedTile, expected_slots
from fusedmoe.tuning.w8a8_tiles import StreamTiles, direct_stream_tiles, stream_tiles

STEP = 128


def unmet_by_pairs(*pairs: tuple[QuantizedTensor, QuantKey]) -> str | None:
    """Why the kernel cannot multiply these weights with rows of these keys, None where it can."""
    for w, key in pairs:
        fmt, columns = w.format, key.group_shape.col
        if fmt.element not in ("e4m3", "int8") or fmt.dtype != STORED.get(key.dtype):
            return f"does not run {fmt.name} with activations {key}"
        if (columns, fmt.group.col % STEP if fmt.group.col > 0 else -1) not in (
            (STEP, 0),
            (-1, -1),
        ):
            return f"wants scales per row, or all per {STEP} columns, not {fmt.name} with {key}"
        if not fmt.symmetric or fmt.scale_kind != "float":
            return f"does not read {fmt.name}"
    return unmet_by_weights(*(w for w, _ in pairs))


def w8a8_decode(
    layer: LayerTensors[QuantizedTensor],
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    tiles: StreamTiles | DirectTiles | None = None,
    x_scale: torch.Tensor | None = None,
) -> None:
    """Run a layer of few slots: x bf16, or quantized already as the first key says, with
    ``x_scale`` fp32 [T, groups]; out bf16; scratch act [R, I] and y [R, H] bf16, R = T * K.

    ``keys`` say how the rows entering w1 and w2 are quantized, ``scales`` fp32 [1] belong to static
    keys. Raises ValueError for pairs that the kernel cannot multiply and for tensors that do not
    fit.
    """
    w1, w2, topk_ids = layer.w1, layer.w2, layer.topk_ids
    reason = unmet_by_pairs((w1, keys[0]), (w2, keys[1]))
    if reason is not None:
        raise ValueError(f"the Hopper kernel {reason}")
    _check(layer, keys[0], x_scale)
    check_layer(layer)
    if not layer.x.is_cuda:
        w8a8_decode_reference(layer, keys, scales, x_scale)
        return
    if topk_ids.numel() == 0:
        return
    if tiles is None:
        tiles = _tiles(layer, keys)
    if isinstance(tiles, DirectTiles):
        from fusedmoe.kernels.triton.hopper_w8a8_direct import Rounding, direct

        first, second = (
            Rounding(_rounding(key), scale, key.scale_kind == "e8m0")
            for key, scale in zip(keys, scales, strict=True)
        )
        direct(layer, (first, second), tiles)
        return
    from fusedmoe.kernels.triton.weighted_sum import weighted_sum

    _two_gemms(layer, keys, scales, x_scale, tiles)
    weighted_sum(layer)


def _tiles(
    layer: LayerTensors[QuantizedTensor], keys: tuple[QuantKey, QuantKey]
) -> StreamTiles | DirectTiles:
    """A token or two are rounded on their way, where that takes no scale of all rows together."""
    (T, K), (e, H, I) = layer.topk_ids.shape, layer.w2.shape  # noqa: E741
    direct, experts = None, layer.num_experts
    if layer.x.dtype == torch.bfloat16 and all(_rounding(key) for key in keys):
        direct = direct_stream_tiles(T, K, experts, e, H, I)
    return direct or stream_tiles(expected_slots(T * K, e, experts), e, H, I)


def _rounding(key: QuantKey) -> str:
    """As in ``hopper_w8a8_direct``; empty for one scale of all rows."""
    if key.static:
        return "given"
    return {PER_TOKEN: "row", PER_TENSOR: ""}.get(key.group_shape, "group")


def _two_gemms(
    layer: LayerTensors[QuantizedTensor],
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    x_scale: torch.Tensor | None,
    tiles: StreamTiles,
) -> None:
    """x -> act -> y, on a GPU."""
    from fusedmoe.kernels.triton.hopper_w8a8 import Rows, gemm

    w1, w2, act = layer.w1, layer.w2, layer.act
    topk_ids, expert_map = layer.topk_ids, layer.expert_map
    e, K, key = w1.shape[0], topk_ids.shape[1], keys[1]
    aligned = align_and_quantize(
        topk_ids, tiles.gemm1.slots, expert_map, e, _rows(layer.x, x_scale), keys[0], scales[0],
        with_largest=key.group_shape == PER_TOKEN and not key.static,
    )  # fmt: skip
    blocks = aligned.alignment
    gemm(
        Rows.stored(aligned.rows, K), w1, act, layer.w1_bias, layer.epilogue, blocks,
        tiles.gemm1, layer.programs, largest=aligned.largest,
        guess=topk_ids.numel() >= e,
    )  # fmt: skip
    e8m0 = key.scale_kind == "e8m0"
    if not key.static and key.group_shape == PER_TENSOR:
        live = {"topk_ids": topk_ids, "expert_map": expert_map, "num_local_experts": e}
        second, early = Rows.stored(quantize_rows(act, key, **live), 1), False  # type: ignore[arg-type]
    else:
        rounding = "largest" if aligned.largest is not None else "given" if key.static else "group"
        scale = scales[1] if aligned.largest is None else aligned.largest.view(-1)
        second, early = Rows(act, scale, 1, rounding, e8m0), True
    gemm(
        second, w2, layer.y, layer.w2_bias, NO_ACTIVATION, blocks, tiles.gemm2, layer.programs,
        early=early,
    )  # fmt: skip


def _rows(x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.Tensor | QuantizedRows:
    return x if x_scale is None else QuantizedRows(x, x_scale)


def w8a8_decode_reference(
    layer: LayerTensors[QuantizedTensor],
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    x_scale: torch.Tensor | None = None,
) -> None:
    """The definition, in plain torch."""
    x, w1, w2, topk_weights, topk_ids, out, act, y = layer[:8]
    (T, K), (e, H, _), expert_map = topk_ids.shape, w2.shape, layer.expert_map
    tile = QuantizedTile(64, 8, STEP, 1, 4, 2)
    blocks, (rows, scale), _ = align_and_quantize(
        topk_ids, 8, expert_map, e, _rows(x, x_scale), keys[0], scales[0]
    )
    epilogue = layer.w1_bias, layer.activation, layer.activation_config
    first = QuantizedProduct(rows, w1, act, blocks, tile, K, *epilogue)
    w8a8_gemm_reference(first, scale, keys[0])
    rows, scale = quantize_rows(
        act, keys[1], scales[1], topk_ids=topk_ids, expert_map=expert_map, num_local_experts=e
    )
    second = QuantizedProduct(rows, w2, y, blocks, tile, 1, layer.w2_bias)
    w8a8_gemm_reference(second, scale, keys[1])
    moe_fused_mul_sum_reference(
        y.view(T, K, H), topk_weights, out, topk_ids, expert_map, num_local_experts=e
    )


def _check(
    layer: LayerTensors[QuantizedTensor], key: QuantKey, x_scale: torch.Tensor | None
) -> None:
    x, H, T = layer.x, layer.w2.shape[1], layer.topk_ids.shape[0]
    dtype = torch.bfloat16
    if x_scale is not None:
        dtype = layer.w1.data.dtype
        groups = 1 if key.group_shape.col == -1 else -(-H // key.group_shape.col)
        allowed = [(T, groups)] if groups > 1 else [(T, 1), (1,), (T,)]
        if tuple(x_scale.shape) not in allowed or x_scale.dtype != torch.float32:
            raise ValueError(
                f"scales of x are {tuple(x_scale.shape)} {x_scale.dtype}, expected "
                f"{allowed[0]} {torch.float32}"
            )
    check_quantized_rows(layer, layer.topk_ids.numel(), x_dtype=dtype)
    if x_scale is not None:
        check_contiguous(x=x, x_scale=x_scale)
    if x.stride(1) != 1:
        raise ValueError(f"rows of x must be dense, its strides are {x.stride()}")
