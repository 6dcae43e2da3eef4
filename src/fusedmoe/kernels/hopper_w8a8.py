"""The experts of a small batch on Hopper with both operands in 8 bits, at the speed of memory.

The whole layer but routing. Device code: ``kernels/triton/hopper_w8a8.py`` (Gluon). The definition
is the weighted sum of ``w8a8_gemm_reference`` twice.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.kernels.grouped_gemm_quantized_w8a8 import w8a8_gemm_reference
from fusedmoe.kernels.hopper_quantized import check_decode, unmet_by_weights
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum_reference
from fusedmoe.kernels.quantize import STORED, quantize_rows
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedDecodeTiles, QuantizedTile

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
    blocks: MoEAlignment | LoneSlots,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    tiles: QuantizedDecodeTiles,
    programs: int,
) -> None:
    """As ``quantized_decode``; ``keys`` say how the rows entering w1 and w2 are quantized, with
    ``scales`` fp32 [1] for static ones.

    Groups of 128 columns are quantized on their way into the product, whole rows by a launch of
    their own. Raises ValueError for pairs that the kernel cannot multiply and for tensors that do
    not fit.
    """
    reason = unmet_by_pairs((w1, keys[0]), (w2, keys[1]))
    if reason is not None:
        raise ValueError(f"the Hopper kernel {reason}")
    check_decode(x, w2, topk_weights, topk_ids, out, act, y, blocks)
    if not x.is_cuda:
        w8a8_decode_reference(
            x, w1, w2, keys, scales, topk_weights, topk_ids, out, act, y, blocks,
            activation=activation, activation_config=activation_config, w1_bias=w1_bias,
            w2_bias=w2_bias, expert_map=expert_map, tiles=tiles, programs=programs,
        )  # fmt: skip
        return
    from fusedmoe.kernels.triton.hopper_quantized import weighted_sum
    from fusedmoe.kernels.triton.hopper_w8a8 import gemm

    if topk_ids.numel() == 0:
        return
    K = topk_ids.shape[1]
    resolved = device_activation(activation, activation_config)
    local = {"expert_map": expert_map, "num_local_experts": w1.shape[0]}
    rows, scale = _rows(x, keys[0], scales[0])
    gemm(
        rows, scale, w1, act, w1_bias, resolved, blocks, weight_addresses(w1), K, tiles.gemm1,
        programs, False, keys[0].scale_kind == "e8m0",
    )  # fmt: skip
    early = keys[1].group_shape.col == STEP
    rows, scale = _rows(act, keys[1], scales[1], topk_ids=topk_ids, **local)
    gemm(
        rows, scale, w2, y, w2_bias, None, blocks, weight_addresses(w2), 1, tiles.gemm2,
        programs, early, keys[1].scale_kind == "e8m0",
    )  # fmt: skip
    weighted_sum(y, topk_weights, topk_ids, expert_map, out, w2.shape[0])


def _rows(
    x: torch.Tensor, key: QuantKey, scale: torch.Tensor | None, **live: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the kernel takes: 16-bit rows for groups, else quantized ones."""
    if key.group_shape.col == STEP:
        return x, None
    return quantize_rows(x, key, scale, **live)  # type: ignore[arg-type]


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
    blocks: MoEAlignment | LoneSlots,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    tiles: QuantizedDecodeTiles,
    programs: int,
) -> None:
    """The definition, in plain torch."""
    (T, K), H = topk_ids.shape, w2.shape[1]
    tile = QuantizedTile(64, tiles.gemm1.slots, STEP, 1, 4, 2)
    rows, scale = quantize_rows(x, keys[0], scales[0])
    w8a8_gemm_reference(
        rows, scale, w1, act, None, blocks, tile, keys[0], top_k=K, bias=w1_bias,
        activation=activation, activation_config=activation_config,
    )  # fmt: skip
    rows, scale = quantize_rows(
        act,
        keys[1],
        scales[1],
        topk_ids=topk_ids,
        expert_map=expert_map,
        num_local_experts=w1.shape[0],
    )
    w8a8_gemm_reference(rows, scale, w2, y, None, blocks, tile, keys[1], top_k=1, bias=w2_bias)
    moe_fused_mul_sum_reference(
        y.view(T, K, H), topk_weights, out, topk_ids, expert_map, num_local_experts=w2.shape[0]
    )
