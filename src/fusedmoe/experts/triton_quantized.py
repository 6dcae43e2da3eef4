"""Quantized experts on Triton in standard rows, for every format the kernels read.

The run itself is ``triton_quantized_run``, what selection compares ``triton_quantized_formats``.

T tokens, K picks, e local experts, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.act_order import as_they_lie, keep_tables, sorted_operands
from fusedmoe.experts.copies import Source
from fusedmoe.experts.quantized_operands import TABLES, Operands, tensors_and_words
from fusedmoe.experts.triton_quantized_formats import (
    capabilities,
    emulated_capabilities,
    unmet_by_groups,
    unmet_by_units,
)
from fusedmoe.experts.triton_quantized_ops import standard_op
from fusedmoe.experts.triton_quantized_run import quantized_experts, row_width
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
)
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR, QuantKey
from fusedmoe.tuning.quantized_tiles import QuantizedTiles


class TritonQuantizedBase(FusedMoEExpertsModular):
    """What standard and batched rows share. ``tiles``, if set, replaces the tuned choice."""

    tiles: QuantizedTiles | None = None
    emulate: ClassVar[bool] = False
    derived = ("_seen", "_operands", "_sorted", "_sources")
    _seen: tuple[torch.Tensor, torch.Tensor, MoEActivation, torch.dtype] | None = None
    _operands: Operands | None = None
    _sorted: Operands | None = None
    _sources: tuple[Source, ...] = ()

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        if activation_key == FP8_DYNAMIC_TENSOR and moe.options.batch_invariant:
            return "one scale for all rows follows the batch"
        return unmet_by_units(moe.device, weight_key, activation_key) or unmet_by_groups(
            weight_key, None if cls.emulate else activation_key
        )

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @property
    def floating_rows(self) -> bool:
        """As ``Operands`` has it, known before there are any."""
        return self.emulate or self.quant_config.a1.key is None or self.quant_config.a2.key is None

    def operands(
        self, w1: torch.Tensor, w2: torch.Tensor, activation: MoEActivation, dtype: torch.dtype
    ) -> Operands:
        """The weights as the quant config describes them; remembered for the same tensors."""
        seen = (w1, w2, activation, dtype)
        old = self._seen
        if old is None or any(a is not b for a, b in zip(seen, old, strict=True)):
            self._operands = Operands.of(
                self.quant_config, w1, w2, activation, dtype, emulate=self.emulate
            )
            self._seen = seen
        assert self._operands is not None
        return self._operands

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Sort act-order columns into groups, where they lie."""
        before, self._sorted, self._sources = self._sorted, None, ()
        formats = self.quant_config.w1.format, self.quant_config.w2.format
        if torch.compiler.is_compiling():
            return
        if not any(fmt is not None and fmt.act_order for fmt in formats):
            return
        weights: Any = layer
        w1, w2 = weights.w13_weight.detach(), weights.w2_weight.detach()
        moe = self.moe_config
        found = sorted_operands(self.operands(w1, w2, moe.activation, moe.in_dtype))
        self._sorted = keep_tables(before, found)
        self._sources = self._sources_of(w1, w2)

    def _sources_of(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[Source, ...]:
        parts = [w1, w2]
        for desc in (self.quant_config.w1, self.quant_config.w2):
            given = desc.scale, desc.zp, desc.group_index, desc.bias
            parts += [part for part in given if part is not None]
        return tuple(map(Source.of, parts))

    def operands_to_run(
        self, w1: torch.Tensor, w2: torch.Tensor, activation: MoEActivation, dtype: torch.dtype
    ) -> Operands:
        """What is known of these weights' columns, if they are as they were; else nothing is."""
        if self._sorted is not None and self._sources_of(w1, w2) == self._sources:
            return self._sorted
        return as_they_lie(self.operands(w1, w2, activation, dtype))

    def flat_operands(
        self,
    ) -> tuple[list[torch.Tensor | None], str, list[torch.Tensor | None]]:
        """What runs, as a custom op takes it; while compiling, sorted columns are not doubted."""
        found, config = self._sorted, self.quant_config
        tables: list[torch.Tensor | None] = [None for _ in TABLES]
        if found is not None:
            config, tables = found.config(config), [getattr(found, name) for name in TABLES]
        return (*tensors_and_words(config), tables)


class TritonQuantizedExperts(TritonQuantizedBase):
    """Weights of every format, with rows as they come or rounded, in standard rows.

    The sum over K is made here. On one rank rows are rounded where they are read; rows that travel
    are rounded before, where their scales can travel with them.
    """

    name = "triton_quantized"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return capabilities(FusedMoEActivationFormat.Standard)

    @property
    def expects_unquantized_inputs(self) -> bool:
        key = self.quant_config.a1.key
        travels = self.moe_config.moe_parallel_config.use_all2all_kernels
        if key is None or self.floating_rows or not travels:
            return True
        return key.static or key == FP8_DYNAMIC_TENSOR

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The activation's output, then the second GEMM's rows by slot."""
        width = self.adjust_N_for_activation(size.N, activation)
        M, topk, H, moe = size.M, size.topk, size.K, self.moe_config
        how = moe.in_dtype, self.floating_rows, moe.options.batch_invariant
        second = row_width(M * topk, H, *how)
        return WorkspaceShapes((M, topk, width), (M, topk, second), (M, H))

    def run(self, work: ExpertsWork) -> None:
        config, batch_invariant = self.activation_config, self.moe_config.options.batch_invariant
        if torch.compiler.is_compiling():
            standard_op(work, *self.flat_operands(), config, batch_invariant, self.emulate)
            return
        operands = self.operands_to_run(work.w1, work.w2, work.activation, work.output.dtype)
        quantized_experts(work, operands, config, batch_invariant=batch_invariant, tiles=self.tiles)


class TritonEmulatedExperts(TritonQuantizedExperts):
    """As ``TritonQuantizedExperts`` for rows whose format no product here takes: they are rounded
    to it and multiplied as floats."""

    name = "triton_emulated"
    emulate = True

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return emulated_capabilities(FusedMoEActivationFormat.Standard)
