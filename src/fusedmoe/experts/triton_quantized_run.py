"""How the quantized experts on Triton run a layer; weights are read as they are stored.

    align -> GEMM1 with bias and activation -> GEMM2 with bias -> weighted sum over K

Rows in floating point are the business of ``triton_quantized_floating``. Where activations are
quantized too, x and the activation's output are rounded on the way: in the GEMM that reads them
(few slots, groups of columns), in the epilogue that writes them, or, where a whole row shares a
scale, by a launch of its own.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2 where gated.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe.activation import ApplyMoEActivationConfig
from fusedmoe.experts.quantized_operands import Operands, SlotProducts
from fusedmoe.experts.triton import slot_blocks
from fusedmoe.experts.triton_quantized_floating import floating_products, floating_tiles
from fusedmoe.kernels.counts import batched_moe_align_block_size
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.grouped_gemm_quantized_w8a8 import QUANTIZED_GROUP, w8a8_gemm
from fusedmoe.kernels.grouped_gemm_w4a8 import w4a8_gemm
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum
from fusedmoe.kernels.quantize import live_rows, quantize_rows
from fusedmoe.modular_kernel import ExpertsWork, scratch
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR, QuantKey
from fusedmoe.tuning.quantized_tiles import QuantizedTiles, slots_block, w8a8_tiles

_FP8 = torch.float8_e4m3fn
_FEW_SLOTS = 32
_FEW_ROWS = 4096


def two_gemms(layer: SlotProducts) -> None:
    """Both products, one after the other."""
    x, operands, act, rows, blocks, tiles, top_k, *_ = layer
    if operands.floating_rows:
        floating_products(layer)
        return
    w1, x_scale = operands.w1, layer.x_scale
    (key, second_key), (key_scale, second_scale) = operands.rounded_rows
    first = QuantizedProduct(x, w1, act, blocks, tiles.gemm1, top_k, *layer.epilogue)
    second = QuantizedProduct(act, operands.w2, rows, blocks, tiles.gemm2, 1, operands.w2_bias)
    columns = key.group_shape.col, second_key.group_shape.col
    on_the_way = tiles.gemm1.slots <= _FEW_SLOTS and not layer.batch_invariant and x_scale is None
    if on_the_way and columns == (tiles.gemm1.depth, tiles.gemm2.depth):
        w8a8_gemm(first, None, key)
        w8a8_gemm(second, None, second_key)
        return
    a, a_scale = quantize_rows(x, key, key_scale) if x_scale is None else (x, x_scale)
    width = tiles.gemm1.rows // (2 if layer.activation.is_gated else 1)
    if key == second_key and width == columns[1] == QUANTIZED_GROUP:
        q = torch.empty(act.shape, dtype=_FP8, device=x.device)
        groups = -(-act.shape[1] // QUANTIZED_GROUP)
        scale = torch.empty(act.shape[0], groups, dtype=torch.float32, device=x.device)
        w8a8_gemm(first._replace(a=a, c=q), a_scale, key, scale)
    else:
        _rounded_product(first._replace(a=a), a_scale, key)
        q, scale = quantize_rows(
            act, second_key, second_scale, num_local_experts=w1.shape[0], **layer.live
        )
    _rounded_product(second._replace(a=q), scale, second_key)


def _rounded_product(product: QuantizedProduct, a_scale: torch.Tensor, key: QuantKey) -> None:
    if product.w.format.element == "int4":
        w4a8_gemm(product, a_scale)
    else:
        w8a8_gemm(product, a_scale, key)


def as_run(
    operands: Operands, R: int, x_scale: torch.Tensor | None, batch_invariant: bool
) -> Operands:
    """What runs R slots: int4 weights with few rounded ones meet them in 16 bits, for tensor cores
    take 8-bit rows in blocks of 64 and more; the products are the same."""
    int4 = "int4" in (operands.w1.format.element, operands.w2.format.element)
    few = slots_block(R, operands.w1.shape[0], 64) <= _FEW_SLOTS
    if int4 and few and not operands.floating_rows and x_scale is None and not batch_invariant:
        return replace(operands, emulate=True)
    return operands


def row_width(R: int, H: int, dtype: torch.dtype, floating: bool, batch_invariant: bool) -> int:
    """Elements of ``dtype`` for a row of the second GEMM, which is kept in fp32 until rows are
    summed where that is one of few roundings (``floating``: rows are in floating point), and where
    it costs nothing, while rows are few; but dtypes must not follow R where bits must not."""
    wide = floating or (R <= _FEW_ROWS and not batch_invariant)
    return H * 4 // dtype.itemsize if wide else H


def _second_rows(
    workspace: torch.Tensor, R: int, H: int, floating: bool, batch_invariant: bool
) -> torch.Tensor:
    """[R, H] in fp32 where ``row_width`` says so and the workspace is that large."""
    size = R * row_width(R, H, workspace.dtype, floating, batch_invariant)
    flat = workspace.flatten()
    if R * H < size <= flat.numel():
        return flat[:size].view(torch.float32).view(R, H)
    return flat[: R * H].view(R, H)


def choose_tiles(operands: Operands, T: int, K: int, batch_invariant: bool) -> QuantizedTiles:
    """Tiles for T tokens of K picks."""
    if operands.floating_rows:
        return floating_tiles(operands, T, K, batch_invariant)
    return w8a8_tiles(T, K, operands.w2.shape[0], operands.columns, batch_invariant=batch_invariant)


def quantized_experts(
    work: ExpertsWork,
    operands: Operands,
    activation_config: ApplyMoEActivationConfig,
    *,
    batch_invariant: bool = False,
    tiles: QuantizedTiles | None = None,
) -> None:
    """Write the weighted sum over K [T, H] into ``work.output``.

    ``operands`` are the weights of ``work`` as they are described. The workspaces hold at least
    R * I and R * H elements, better R * ``row_width``. Ids that name no local expert count as
    nothing. ``tiles`` overrides the choice of ``tuning.quantized_tiles``.
    """
    x, x_scale, expert_map = work.hidden_states, work.a1q_scale, work.expert_map
    topk_ids, workspace2 = work.topk_ids, work.workspace2
    assert workspace2 is not None
    (T, K), (e, H, I) = topk_ids.shape, operands.w2.shape  # noqa: E741
    R = T * K
    if tiles is None:
        operands = as_run(operands, R, x_scale, batch_invariant)
        tiles = choose_tiles(operands, T, K, batch_invariant)
    rows = _second_rows(workspace2, R, H, operands.floating_rows, batch_invariant)
    two_gemms(
        SlotProducts(
            x if x.stride(1) == 1 else x.contiguous(),
            operands,
            scratch(work.workspace13, R, I),
            rows,
            slot_blocks(topk_ids, e, expert_map, tiles.gemm1.slots, batch_invariant),
            tiles,
            K,
            work.activation,
            activation_config,
            topk_ids.reshape(-1).contiguous(),
            expert_map,
            x_scale,
            batch_invariant,
        )
    )
    by_token, weights = rows.view(T, K, H), work.output_weights
    moe_fused_mul_sum(by_token, weights, work.output, topk_ids, expert_map, num_local_experts=e)


def batched_quantized_experts(
    work: ExpertsWork,
    operands: Operands,
    expert_num_tokens: torch.Tensor,
    activation_config: ApplyMoEActivationConfig,
    *,
    batch_invariant: bool = False,
    tiles: QuantizedTiles | None = None,
) -> None:
    """Write ``work.output`` [e, M, H] row by row, up to each expert's count; the first workspace
    holds at least e * M * I elements. Nothing is weighted or summed."""
    (e, M, H), I = work.hidden_states.shape, operands.w2.shape[2]  # noqa: E741
    if M == 0:
        return
    if tiles is None:
        rows = e * min(M, _LIKELY_ROWS)
        operands = as_run(operands, rows, None, batch_invariant)
        tiles = choose_tiles(operands, rows, 1, batch_invariant)
    one_scale = FP8_DYNAMIC_TENSOR in (operands.a1, operands.a2)
    experts = None
    if one_scale or operands.rows_follow:
        experts = _experts_of_rows(expert_num_tokens, M)
    x = work.hidden_states.contiguous().view(e * M, H)
    two_gemms(
        SlotProducts(
            live_rows(x, experts) if one_scale else x,
            operands,
            scratch(work.workspace13, e * M, I),
            work.output.view(e * M, H),
            batched_moe_align_block_size(M, tiles.gemm1.slots, expert_num_tokens),
            tiles,
            1,
            work.activation,
            activation_config,
            experts,
            batch_invariant=batch_invariant,
        )
    )


def _experts_of_rows(expert_num_tokens: torch.Tensor, M: int) -> torch.Tensor:
    """int32 [e * M]: the expert of each batched row, -1 past its count."""
    row = torch.arange(M, device=expert_num_tokens.device)
    expert = torch.arange(expert_num_tokens.shape[0], device=row.device, dtype=torch.int32)
    return torch.where(row < expert_num_tokens[:, None], expert[:, None], -1).flatten()


# An expert's rows are known only on the device; blocks of more than this would mostly be padding.
_LIKELY_ROWS = 64
