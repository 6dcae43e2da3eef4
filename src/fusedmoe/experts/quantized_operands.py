"""Operands: what the quantized experts multiply, as their kernels and as compiled code are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.row_steps import BothSteps, RowSteps
from fusedmoe.quantization.config import (
    FusedMoEQuantConfig,
    FusedMoEQuantDesc,
    biased_moe_quant_config,
)
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.keys import PER_TENSOR, GroupShape, QuantKey, ScaleKind
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.quantized_tiles import QuantizedTiles

TABLES = ("order", "down_order", "places")
"""The fields of ``Operands`` that say where columns lie."""


@dataclass(frozen=True)
class Operands:
    """The weights of a layer and how the rows that meet them are rounded.

    The keys are those of the rows entering w1 and w2, None: not at all. The scales fp32 [1] belong
    to static keys. ``emulate``: rows are rounded to their format, but multiplied as the floats they
    came as; so they are where one of the keys is None. Where act-order columns do not lie in the
    order of what meets them (see ``act_order``): ``order`` int32 [e, H], the column of x that meets
    each column of w1; ``down_order`` int32 [e, I], the feature of w1 that meets each column of w2,
    and ``places``, its inverse; all in the order of the weights.
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
    order: torch.Tensor | None = None
    down_order: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        config: FusedMoEQuantConfig,
        w1: torch.Tensor,
        w2: torch.Tensor,
        activation: MoEActivation,
        dtype: torch.dtype,
        *,
        emulate: bool = False,
    ) -> Operands:
        """The data of both weights as ``config`` describes them; ``dtype`` is that of the rows."""
        first, second = quantized_pair(w1, w2, config, activation, dtype)
        keys, scales = (config.a1.key, config.a2.key), (config.a1.scale, config.a2.scale)
        return cls(first, second, *keys, *scales, config.w1_bias, config.w2_bias, emulate)

    def config(self, like: FusedMoEQuantConfig) -> FusedMoEQuantConfig:
        """What describes these weights, where ``like`` describes their rows."""
        return replace(
            like, w1=_described(self.w1, self.w1_bias), w2=_described(self.w2, self.w2_bias)
        )

    @property
    def floating_rows(self) -> bool:
        """Whether the products take rows in floating point."""
        return self.emulate or self.a1 is None or self.a2 is None

    @property
    def rows_follow(self) -> bool:
        """Whether rows are rearranged as their experts' columns lie."""
        return self.order is not None or self.places is not None

    @property
    def steps(self) -> BothSteps:
        """What rows in floating point go through before each product."""
        return (
            RowSteps(self.a1, self.a1_scale, self.order),
            RowSteps(self.a2, self.a2_scale, self.down_order),
        )

    @property
    def rounded_rows(
        self,
    ) -> tuple[tuple[QuantKey, QuantKey], tuple[torch.Tensor | None, torch.Tensor | None]]:
        """The keys and the scales of rows that the products take rounded."""
        assert self.a1 is not None
        assert self.a2 is not None
        return (self.a1, self.a2), (self.a1_scale, self.a2_scale)

    @property
    def columns(self) -> tuple[int, int]:
        """Columns after which a scale changes in each GEMM, -1 for none."""
        a1, a2 = (None, None) if self.floating_rows else (self.a1, self.a2)
        return _columns(self.w1, a1), _columns(self.w2, a2)


class SlotProducts(NamedTuple):
    """Both products of a layer, slot by slot and unweighted.

    act[slot] = activation(x[slot // top_k] @ w1.T), rows[slot] = act[slot] @ w2.T with biases; x
    [*, H] with dense rows, act [R, I] scratch, rows [R, H]; ``blocks`` of the tiles' slots.
    ``x_scale``: x is rounded already, as ``quantize_rows`` does. ids [R] and ``expert_map`` say
    which slots count where one scale serves all of them.
    """

    x: torch.Tensor
    operands: Operands
    act: torch.Tensor
    rows: torch.Tensor
    blocks: MoEAlignment | LoneSlots
    tiles: QuantizedTiles
    top_k: int
    activation: MoEActivation
    config: ApplyMoEActivationConfig
    ids: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    x_scale: torch.Tensor | None = None
    batch_invariant: bool = False

    @property
    def epilogue(self) -> tuple[torch.Tensor | None, MoEActivation, ApplyMoEActivationConfig]:
        """What the first product does to its sums: bias, activation and its numbers."""
        return self.operands.w1_bias, self.activation, self.config

    @property
    def live(self) -> dict[str, Any]:
        """Which slots count, as what rounds rows takes it."""
        return {"topk_ids": self.ids, "expert_map": self.expert_map}


def _columns(w: QuantizedTensor, key: QuantKey | None) -> int:
    sizes = (w.format.group.col, -1 if key is None else key.group_shape.col)
    return min((size for size in sizes if size > 0), default=-1)


def _described(w: QuantizedTensor, bias: torch.Tensor | None) -> FusedMoEQuantDesc:
    parts = {"scale2": w.scale2, "zp": w.zero_point, "group_index": w.group_index, "bias": bias}
    return FusedMoEQuantDesc.of_weight(w.format, w.scale, **parts)


def quantized_pair(
    w1: torch.Tensor,
    w2: torch.Tensor,
    config: FusedMoEQuantConfig,
    activation: MoEActivation,
    dtype: torch.dtype,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """The data of both weights with the parts that ``config`` has for them."""
    return (
        config.w1.weight(
            w1,
            dtype,
            shards=2 if activation.is_gated else 1,
            interleaved=activation is MoEActivation.SWIGLUOAI,
        ),
        config.w2.weight(w2, dtype),
    )


def tensors_and_words(config: FusedMoEQuantConfig) -> tuple[list[torch.Tensor | None], str]:
    """A quant config as an op's schema can hold it; ``config_of`` is the inverse.

    Without words: the biases of unquantized weights.
    """
    if not config.is_quantized:
        return [config.w1_bias, config.w2_bias], ""
    tensors: list[torch.Tensor | None] = []
    words = []
    for rows, weight in ((config.a1, config.w1), (config.a2, config.w2)):
        assert weight.format is not None
        tensors += [weight.scale, weight.scale2, weight.zp, weight.group_index, weight.bias]
        tensors.append(rows.scale)
        row, col = rows.shape or PER_TENSOR
        dtype = str(rows.dtype).removeprefix("torch.")
        words.append(f"{weight.format.name} {dtype} {row} {col} {rows.scale_kind}")
    return tensors, "|".join(words)


def config_of(tensors: Sequence[torch.Tensor | None], words: str) -> FusedMoEQuantConfig:
    if not words:
        return biased_moe_quant_config(*tensors)
    descs: list[FusedMoEQuantDesc] = []
    for side, given in zip(words.split("|"), (tensors[:6], tensors[6:]), strict=True):
        name, dtype, row, col, kind = side.split()
        scale, scale2, zp, group_index, bias, rows_scale = given
        fmt, scale_kind = format_named(name), cast("ScaleKind", kind)
        rows = FusedMoEQuantDesc(
            dtype=getattr(torch, dtype, dtype),
            shape=GroupShape(int(row), int(col)),
            scale=rows_scale,
            scale_kind=scale_kind,
        )
        parts = {"scale2": scale2, "zp": zp, "group_index": group_index, "bias": bias}
        weight = FusedMoEQuantDesc.of_weight(fmt, scale, **parts)
        descs += [FusedMoEQuantDesc() if dtype == "None" else rows, weight]
    a1, w1, a2, w2 = descs
    return FusedMoEQuantConfig(a1=a1, a2=a2, w1=w1, w2=w2)
