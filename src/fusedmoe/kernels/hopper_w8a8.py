"""The experts of a small batch on Hopper with both operands in 8 bits, at the speed of memory.

The whole layer but routing. Device code: ``kernels/triton/hopper_w8a8.py`` (Gluon). The definition
is the weighted sum of ``w8a8_gemm_reference`` twice.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.activation import DeviceActivation, device_activation
from fusedmoe.kernels.align_quantize import align_and_quantize
from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.kernels.grouped_gemm_quantized_w8a8 import w8a8_gemm_reference
from fusedmoe.kernels.hopper_quantized import check_layer, unmet_by_weights
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum_reference
from fusedmoe.kernels.quantize import STORED, QuantizedRows, quantize_rows
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
    x: torch.Tensor,
    w1: QuantizedTensor,
    w2: QuantizedTensor,
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    tiles: StreamTiles | DirectTiles | None = None,
    programs: int,
) -> None:
    """out[t] = sum over k of topk_weights[t, k] * expert_k(x[t]), weights None: all one.

    x [T, H] bf16, or quantized already as the first key says, with ``x_scale`` fp32 [T, groups];
    w1 [e, S * I, H], w2 [e, H, I]; ``keys`` say how the rows entering w1 and w2 are quantized,
    ``scales`` fp32 [1] belong to static keys.
    topk_ids int [T, K]; out [T, H] bf16; scratch act [R, I] and y [R, H] bf16, R = T * K.
    ``programs``: the number of multiprocessors.

    Raises ValueError for pairs that the kernel cannot multiply and for tensors that do not fit.
    """
    reason = unmet_by_pairs((w1, keys[0]), (w2, keys[1]))
    if reason is not None:
        raise ValueError(f"the Hopper kernel {reason}")
    rows = x if x_scale is None else QuantizedRows(x, x_scale)
    _check(rows, w1, w2, keys[0], topk_weights, topk_ids, out, act, y)
    check_layer(w1, w2, topk_ids, act, y, activation, (w1_bias, w2_bias), expert_map)
    if not x.is_cuda:
        w8a8_decode_reference(
            x, w1, w2, keys, scales, topk_weights, topk_ids, out, act, y, activation=activation,
            activation_config=activation_config, w1_bias=w1_bias, w2_bias=w2_bias,
            expert_map=expert_map, x_scale=x_scale, tiles=tiles, programs=programs,
        )  # fmt: skip
        return
    if topk_ids.numel() == 0:
        return
    if tiles is None:
        tiles = _tiles(x, w2, keys, topk_ids, expert_map)
    act_on = device_activation(activation, activation_config)
    if isinstance(tiles, DirectTiles):
        from fusedmoe.kernels.triton.hopper_w8a8_direct import Rounding, direct

        first, second = (
            Rounding(_rounding(key), scale, key.scale_kind == "e8m0")
            for key, scale in zip(keys, scales, strict=True)
        )
        direct(
            x, w1, w2, (first, second), topk_weights, topk_ids, out, act, act_on, w1_bias, w2_bias,
            expert_map, tiles, programs,
        )  # fmt: skip
        return
    from fusedmoe.kernels.triton.weighted_sum import weighted_sum

    _two_gemms(
        rows, w1, w2, keys, scales, topk_ids, act, y, act_on, w1_bias, w2_bias, expert_map, tiles,
        programs,
    )  # fmt: skip
    weighted_sum(y, topk_weights, topk_ids, expert_map, out, w2.shape[0])


def _tiles(
    x: torch.Tensor,
    w2: QuantizedTensor,
    keys: tuple[QuantKey, QuantKey],
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> StreamTiles | DirectTiles:
    """A token or two are rounded on their way, where that takes no scale of all rows together."""
    experts = w2.shape[0] if expert_map is None else expert_map.shape[0]
    direct = None
    if x.dtype == torch.bfloat16 and all(_rounding(key) for key in keys):
        (T, K), (_, H, I) = topk_ids.shape, w2.shape  # noqa: E741
        direct = direct_stream_tiles(T, K, experts, H, I)
    return direct or stream_tiles(expected_slots(topk_ids.numel(), w2.shape[0], experts), *w2.shape)


def _rounding(key: QuantKey) -> str:
    """As in ``hopper_w8a8_direct``; empty for one scale of all rows."""
    if key.static:
        return "given"
    return {PER_TOKEN: "row", PER_TENSOR: ""}.get(key.group_shape, "group")


def _two_gemms(
    x: torch.Tensor | QuantizedRows,
    w1: QuantizedTensor,
    w2: QuantizedTensor,
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    topk_ids: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    activation: DeviceActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    tiles: StreamTiles,
    programs: int,
) -> None:
    """x -> act -> y, on a GPU."""
    from fusedmoe.kernels.triton.hopper_w8a8 import Rows, gemm

    e, K, key = w1.shape[0], topk_ids.shape[1], keys[1]
    aligned = align_and_quantize(
        topk_ids, tiles.gemm1.slots, expert_map, e, x, keys[0], scales[0],
        with_largest=key.group_shape == PER_TOKEN and not key.static,
    )  # fmt: skip
    blocks = aligned.alignment
    gemm(
        Rows.stored(aligned.rows, K), w1, act, w1_bias, activation, blocks, weight_addresses(w1),
        tiles.gemm1, programs, largest=aligned.largest,
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
        second, w2, y, w2_bias, None, blocks, weight_addresses(w2), tiles.gemm2, programs,
        early=early,
    )  # fmt: skip


def w8a8_decode_reference(
    x: torch.Tensor,
    w1: QuantizedTensor,
    w2: QuantizedTensor,
    keys: tuple[QuantKey, QuantKey],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    tiles: StreamTiles | DirectTiles | None = None,
    programs: int,
) -> None:
    """The definition, in plain torch."""
    (T, K), (e, H, _) = topk_ids.shape, w2.shape
    tile = QuantizedTile(64, 8, STEP, 1, 4, 2)
    given = x if x_scale is None else QuantizedRows(x, x_scale)
    blocks, (rows, scale), _ = align_and_quantize(
        topk_ids, 8, expert_map, e, given, keys[0], scales[0]
    )
    w8a8_gemm_reference(
        rows, scale, w1, act, None, blocks, tile, keys[0], top_k=K, bias=w1_bias,
        activation=activation, activation_config=activation_config,
    )  # fmt: skip
    rows, scale = quantize_rows(
        act, keys[1], scales[1], topk_ids=topk_ids, expert_map=expert_map, num_local_experts=e
    )
    w8a8_gemm_reference(rows, scale, w2, y, None, blocks, tile, keys[1], top_k=1, bias=w2_bias)
    moe_fused_mul_sum_reference(
        y.view(T, K, H), topk_weights, out, topk_ids, expert_map, num_local_experts=e
    )


def _check(
    x: torch.Tensor | QuantizedRows,
    w1: QuantizedTensor,
    w2: QuantizedTensor,
    key: QuantKey,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
) -> None:
    (_, H, I), T = w2.shape, topk_ids.shape[0]  # noqa: E741
    rows, dtype = (x.data if isinstance(x, QuantizedRows) else x), torch.bfloat16
    if isinstance(x, QuantizedRows):
        dtype = w1.data.dtype
        groups = 1 if key.group_shape.col == -1 else -(-H // key.group_shape.col)
        allowed = [(T, groups)] if groups > 1 else [(T, 1), (1,), (T,)]
        if tuple(x.scale.shape) not in allowed or x.scale.dtype != torch.float32:
            raise ValueError(
                f"scales of x are {tuple(x.scale.shape)} {x.scale.dtype}, expected "
                f"{allowed[0]} {torch.float32}"
            )
    sizes = H, I, topk_ids.numel()
    check_quantized_rows(sizes, rows, topk_weights, topk_ids, out, act, y, x_dtype=dtype)
    if isinstance(x, QuantizedRows):
        check_contiguous(x=x.data, x_scale=x.scale)
    if rows.stride(1) != 1:
        raise ValueError(f"rows of x must be dense, its strides are {rows.stride()}")
