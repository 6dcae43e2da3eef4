"""How the quantized experts on Triton run a layer; weights are read as they are stored.

    align -> GEMM1 with bias and activation -> GEMM2 with bias -> weighted sum over K

Where activations are quantized too, x and the activation's output are rounded on the way: in the
GEMM that reads them (few slots, groups of columns), in the epilogue that writes them, or, where a
whole row shares a scale, by a launch of its own.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2 where gated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment, moe_align_block_size
from fusedmoe.kernels.counts import batched_moe_align_block_size
from fusedmoe.kernels.grouped_gemm_packed import SUPERBLOCKS, is_packed, packed_gemm
from fusedmoe.kernels.grouped_gemm_quantized import NIBBLES, quantized_gemm, to_planes
from fusedmoe.kernels.grouped_gemm_quantized_w8a8 import QUANTIZED_GROUP, w8a8_gemm
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum
from fusedmoe.kernels.quantize import live_rows, quantize_rows
from fusedmoe.quantization.activations import fake_quantize
from fusedmoe.quantization.keys import PER_TENSOR, QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import (
    QuantizedTile,
    QuantizedTiles,
    packed_tile,
    w8a8_tiles,
    weight_only_tiles,
)

_FP8 = torch.float8_e4m3fn
_FEW_SLOTS = 32
_FEW_ROWS = 4096
_MANY_TOKENS = 512


@dataclass(frozen=True)
class Operands:
    """The weights of a layer and how the rows that meet them are rounded.

    The keys are those of the rows entering w1 and w2, None: not at all, both. The scales fp32 [1]
    belong to static keys. ``emulate``: rows are rounded to their format, but multiplied as the
    floats they came as.
    """

    w1: QuantizedTensor
    w2: QuantizedTensor
    a1: QuantKey | None = None
    a2: QuantKey | None = None
    a1_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    w1_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    emulate: bool = False

    @property
    def floating_rows(self) -> bool:
        """Whether the products take rows in floating point."""
        return self.emulate or self.a1 is None or self.a2 is None

    @property
    def columns(self) -> tuple[int, int]:
        """Columns after which a scale changes in each GEMM, -1 for none."""
        a1, a2 = (None, None) if self.floating_rows else (self.a1, self.a2)
        return _columns(self.w1, a1), _columns(self.w2, a2)


def _columns(w: QuantizedTensor, key: QuantKey | None) -> int:
    sizes = (w.format.group.col, -1 if key is None else key.group_shape.col)
    return min((size for size in sizes if size > 0), default=-1)


def two_gemms(
    x: torch.Tensor,
    operands: Operands,
    act: torch.Tensor,
    rows: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tiles: QuantizedTiles,
    top_k: int,
    activation: MoEActivation,
    config: ApplyMoEActivationConfig,
    ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """x [rows of x, H] -> rows [R, H] by slot, unweighted; act [R, I] is scratch.

    ``x_scale``: x is already rounded, as ``quantize_rows`` does. ids [R] and ``expert_map`` say
    which slots count where one scale serves all of them.
    """
    first: dict[str, Any] = {
        "top_k": top_k,
        "bias": operands.w1_bias,
        "activation": activation,
        "activation_config": config,
    }
    second: dict[str, Any] = {"top_k": 1, "bias": operands.w2_bias}
    live: dict[str, Any] = {"topk_ids": ids, "expert_map": expert_map}
    if operands.floating_rows:
        _floating(x, operands, act, rows, blocks, tiles, first, second, live, batch_invariant)
        return
    w1, w2, key, second_key = operands.w1, operands.w2, operands.a1, operands.a2
    assert key is not None
    assert second_key is not None
    columns = key.group_shape.col, second_key.group_shape.col
    on_the_way = tiles.gemm1.slots <= _FEW_SLOTS and not batch_invariant and x_scale is None
    if on_the_way and columns == (tiles.gemm1.depth, tiles.gemm2.depth):
        w8a8_gemm(x, None, w1, act, None, blocks, tiles.gemm1, key, **first)
        w8a8_gemm(act, None, w2, rows, None, blocks, tiles.gemm2, second_key, **second)
        return
    a, a_scale = quantize_rows(x, key, operands.a1_scale) if x_scale is None else (x, x_scale)
    width = tiles.gemm1.rows // (2 if activation.is_gated else 1)
    if key == second_key and width == columns[1] == QUANTIZED_GROUP:
        q = torch.empty(act.shape, dtype=_FP8, device=x.device)
        groups = -(-act.shape[1] // QUANTIZED_GROUP)
        scale = torch.empty(act.shape[0], groups, dtype=torch.float32, device=x.device)
        w8a8_gemm(a, a_scale, w1, q, scale, blocks, tiles.gemm1, key, **first)
    else:
        w8a8_gemm(a, a_scale, w1, act, None, blocks, tiles.gemm1, key, **first)
        q, scale = quantize_rows(
            act, second_key, operands.a2_scale, num_local_experts=w1.shape[0], **live
        )
    w8a8_gemm(q, scale, w2, rows, None, blocks, tiles.gemm2, second_key, **second)


def _floating(
    x: torch.Tensor,
    operands: Operands,
    act: torch.Tensor,
    rows: torch.Tensor,
    blocks: MoEAlignment | LoneSlots,
    tiles: QuantizedTiles,
    first: dict[str, Any],
    second: dict[str, Any],
    live: dict[str, Any],
    batch_invariant: bool,
) -> None:
    """Both products with rows in floating point, as they come or rounded to a format and back."""
    w1, w2 = operands.w1, operands.w2
    # The rows in between keep the order of their columns unless both products know another one.
    planes = _in_planes(w2) and (operands.emulate or not is_packed(w1.format))
    many = _in_planes(w1) and (batch_invariant or x.shape[0] >= _MANY_TOKENS)
    if operands.emulate:
        x = fake_quantize(x, operands.a1, operands.a1_scale).to(x.dtype)
    a = to_planes(x) if many else x
    _product(a, w1, act, blocks, tiles.gemm1, (many, planes and not operands.emulate), **first)
    if operands.emulate:
        if operands.a2 is not None and operands.a2.group_shape == PER_TENSOR:
            act = live_rows(act, num_local_experts=w1.shape[0], **live)
        act = fake_quantize(act, operands.a2, operands.a2_scale).to(act.dtype)
        act = to_planes(act) if planes else act
    _product(act, w2, rows, blocks, tiles.gemm2, (planes, False), **second)


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
        packed_gemm(a, w, c, blocks, tile, **rest)
    else:
        quantized_gemm(a, w, c, blocks, tile, a_planes=planes[0], c_planes=planes[1], **rest)


def row_width(R: int, H: int, dtype: torch.dtype, batch_invariant: bool) -> int:
    """Elements of ``dtype`` for a row of the second GEMM: while rows are few they are kept in fp32
    until they are summed, which rounds once less and costs nothing; their dtype must not follow R
    where bits must not."""
    return H if batch_invariant or R > _FEW_ROWS else H * 4 // dtype.itemsize


def _second_rows(workspace: torch.Tensor, R: int, H: int, batch_invariant: bool) -> torch.Tensor:
    """[R, H] in fp32 where ``row_width`` says so and the workspace is that large."""
    size = R * row_width(R, H, workspace.dtype, batch_invariant)
    flat = workspace.flatten()
    if R * H < size <= flat.numel():
        return flat[:size].view(torch.float32).view(R, H)
    return flat[: R * H].view(R, H)


def choose_tiles(operands: Operands, T: int, K: int, batch_invariant: bool) -> QuantizedTiles:
    """Tiles for T tokens of K picks."""
    (e, H, I), w1 = operands.w2.shape, operands.w1  # noqa: E741
    if operands.floating_rows:
        both = operands.w1, operands.w2
        packed = any(is_packed(w.format) for w in both)
        bits = 4 if w1.format.element in NIBBLES and not packed else 8
        tiles = weight_only_tiles(
            T, K, e, H, I, bits, operands.columns, batch_invariant=batch_invariant
        )
        return QuantizedTiles(*(_fitting(w, t) for w, t in zip(both, tiles, strict=True)))
    return w8a8_tiles(T, K, e, H, I, operands.columns, batch_invariant=batch_invariant)


def _fitting(w: QuantizedTensor, tile: QuantizedTile) -> QuantizedTile:
    return packed_tile(tile, w.format.element in SUPERBLOCKS) if is_packed(w.format) else tile


def quantized_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    operands: Operands,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    activation_config: ApplyMoEActivationConfig,
    expert_map: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    batch_invariant: bool = False,
    tiles: QuantizedTiles | None = None,
) -> None:
    """Write the weighted sum over K [T, H] into ``output``.

    hidden_states [T, H] (``x_scale``: already rounded), topk_weights fp32 [T, K] (None: all one).
    The workspaces hold at least R * I and R * H elements, better R * ``row_width``. Ids that name
    no local expert count as nothing. ``tiles`` overrides the choice of ``tuning.quantized_tiles``.
    """
    (T, K), (e, H, I) = topk_ids.shape, operands.w2.shape  # noqa: E741
    R = T * K
    if tiles is None:
        tiles = choose_tiles(operands, T, K, batch_invariant)
    if hidden_states.stride(1) != 1:
        hidden_states = hidden_states.contiguous()
    act = workspace13.flatten()[: R * I].view(R, I)
    rows = _second_rows(workspace2, R, H, batch_invariant)
    two_gemms(
        hidden_states,
        operands,
        act,
        rows,
        _blocks(topk_ids, e, expert_map, tiles.gemm1.slots, batch_invariant),
        tiles,
        K,
        activation,
        activation_config,
        topk_ids,
        expert_map,
        x_scale=x_scale,
        batch_invariant=batch_invariant,
    )
    moe_fused_mul_sum(
        rows.view(T, K, H), topk_weights, output, topk_ids, expert_map, num_local_experts=e
    )


def batched_quantized_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    operands: Operands,
    expert_num_tokens: torch.Tensor,
    activation: MoEActivation,
    activation_config: ApplyMoEActivationConfig,
    workspace13: torch.Tensor,
    *,
    batch_invariant: bool = False,
    tiles: QuantizedTiles | None = None,
) -> None:
    """Write ``output`` [e, M, H] from hidden_states [e, M, H], row by row, up to each expert's
    count; ``workspace13`` holds at least e * M * I elements. Nothing is weighted or summed."""
    (e, M, H), I = hidden_states.shape, operands.w2.shape[2]  # noqa: E741
    if M == 0:
        return
    if tiles is None:
        rows = e * min(M, _LIKELY_ROWS)
        tiles = choose_tiles(operands, rows, 1, batch_invariant)
    two_gemms(
        hidden_states.contiguous().view(e * M, H),
        operands,
        workspace13.flatten()[: e * M * I].view(e * M, I),
        output.view(e * M, H),
        batched_moe_align_block_size(M, tiles.gemm1.slots, expert_num_tokens),
        tiles,
        1,
        activation,
        activation_config,
        batch_invariant=batch_invariant,
    )


# An expert's rows are known only on the device; blocks of more than this would mostly be padding.
_LIKELY_ROWS = 64


def _blocks(
    topk_ids: torch.Tensor,
    e: int,
    expert_map: torch.Tensor | None,
    slots: int,
    batch_invariant: bool,
) -> MoEAlignment | LoneSlots:
    """No table, and a launch less, where slots are so few that two rarely share an expert."""
    if topk_ids.numel() * 4 <= e and not batch_invariant:
        return LoneSlots(topk_ids.reshape(-1), expert_map)
    alignment = moe_align_block_size(
        topk_ids,
        slots,
        e if expert_map is None else expert_map.shape[0],
        expert_map,
        ignore_invalid_experts=True,
        num_local_experts=e,
    )
    return MoEAlignment(*alignment[:3])
