"""Quantized experts on Triton, in Standard and in batched rows, for every format the kernels read.

The run itself is ``triton_quantized_run``; here is what selection sees.

T tokens, K picks, e local experts, M rows per expert at most, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import ClassVar

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.torch_quantized import quantized_pair
from fusedmoe.experts.triton_quantized_ops import batched_op, flat, standard_op
from fusedmoe.experts.triton_quantized_run import (
    Operands,
    batched_quantized_experts,
    quantized_experts,
    row_width,
)
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    WorkspaceShapes,
    rows_per_expert,
)
from fusedmoe.quantization.formats.keys import ACTIVATION_KEYS
from fusedmoe.quantization.keys import (
    ANY,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP8_DYNAMIC,
    PER_ROW,
    PER_TENSOR,
    GroupShape,
    QuantKey,
    fp8_dynamic_group,
)
from fusedmoe.topk_weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)
from fusedmoe.tuning.quantized_tiles import QuantizedTiles

_FP8 = torch.float8_e4m3fn
_FP8_WEIGHTS = (
    QuantKey(_FP8, True, PER_TENSOR),
    QuantKey(_FP8, True, PER_ROW),
    QuantKey(_FP8, True, GroupShape(ANY, ANY)),
)
_WEIGHT_ONLY = (
    *_FP8_WEIGHTS,
    QuantKey("int4", True, PER_ROW),
    QuantKey("int4", True, PER_ROW, symmetric=False),
    QuantKey("int4", True, GroupShape(1, ANY)),
    QuantKey("int4", True, GroupShape(1, ANY), symmetric=False),
    QuantKey(torch.int8, True, PER_ROW),
    QuantKey(torch.int8, True, GroupShape(1, ANY)),
    QuantKey(torch.int8, True, GroupShape(1, ANY), symmetric=False),
    QuantKey("mxfp4", True, GroupShape(1, 32), scale_kind="e8m0"),
    QuantKey("mxfp8", True, GroupShape(1, 32), scale_kind="e8m0"),
    QuantKey("nvfp4", True, GroupShape(1, 16), scale_kind="e4m3", second_scale=True),
)
_WHOLE_ROWS = (FP8_DYNAMIC_TENSOR, FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN)
PAIRS: frozenset[tuple[QuantKey | None, QuantKey | None]] = frozenset(
    {
        *((weight, None) for weight in _WEIGHT_ONLY),
        *((weight, rows) for weight in _FP8_WEIGHTS for rows in _WHOLE_ROWS),
        *(
            (QuantKey(_FP8, True, GroupShape(ANY, columns)), fp8_dynamic_group(columns, kind))
            for columns in (32, 64, 128)
            for kind in ("float", "e8m0")
        ),
        (QuantKey(torch.int8, True, PER_ROW), INT8_DYNAMIC_TOKEN),
        (QuantKey(torch.int8, True, PER_ROW), INT8_STATIC_TENSOR),
        (QuantKey("mxfp8", True, GroupShape(1, 32), scale_kind="e8m0"), MXFP8_DYNAMIC),
    }
)
"""(weight, activation) that the kernels read; None: activations as they come."""


def unmet_by_groups(weight_key: QuantKey | None, activation_key: QuantKey | None) -> str | None:
    """Why columns that share a scale do not fit the kernels' steps, None where they do."""
    least = 16 if activation_key is None else 32
    for key in (weight_key, activation_key):
        columns = -1 if key is None else key.group_shape.col
        if columns > 0 and (columns < least or columns & (columns - 1)):
            return f"wants groups of a power of two of at least {least} columns, got {columns}"
    return None


class _Quantized(FusedMoEExpertsModular):
    """What both formats of rows share. ``tiles``, if set, replaces the tuned choice."""

    tiles: QuantizedTiles | None = None
    emulate: ClassVar[bool] = False
    _seen: tuple[torch.Tensor, torch.Tensor, MoEActivation, torch.dtype] | None = None
    _operands: Operands | None = None

    @classmethod
    def is_supported_config(
        cls,
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        supported, reason = super().is_supported_config(
            moe_config, weight_key, activation_key, activation_format
        )
        if (
            supported
            and activation_key == FP8_DYNAMIC_TENSOR
            and moe_config.options.batch_invariant
        ):
            return False, "one scale for all rows follows the batch"
        if supported:
            rows = None if cls.emulate else activation_key
            reason = unmet_by_groups(weight_key, rows)
        return reason is None, reason

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def operands(
        self, w1: torch.Tensor, w2: torch.Tensor, activation: MoEActivation, dtype: torch.dtype
    ) -> Operands:
        """The weights as the quant config describes them; remembered for the same tensors."""
        seen = (w1, w2, activation, dtype)
        old = self._seen
        if old is None or any(a is not b for a, b in zip(seen, old, strict=True)):
            config = self.quant_config
            first, second = quantized_pair(w1, w2, config, activation, dtype)
            self._operands = Operands(
                first,
                second,
                config.a1.key,
                config.a2.key,
                config.a1.scale,
                config.a2.scale,
                config.w1_bias,
                config.w2_bias,
                self.emulate,
            )
            self._seen = seen
        assert self._operands is not None
        return self._operands


class TritonQuantizedExperts(_Quantized):
    """Standard rows; the sum over K is made here. On one rank rows are rounded where they are read;
    rows that travel are rounded before, where their scales can travel with them."""

    name = "triton_quantized"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return _capabilities(FusedMoEActivationFormat.Standard)

    @property
    def expects_unquantized_inputs(self) -> bool:
        key = self.quant_config.a1.key
        travels = self.moe_config.moe_parallel_config.use_all2all_kernels
        return self.emulate or not travels or key is None or key.static or key == FP8_DYNAMIC_TENSOR

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> WorkspaceShapes:
        """The activation's output, then the second GEMM's rows by slot."""
        width = self.adjust_N_for_activation(N, activation)
        moe = self.moe_config
        second = row_width(M * topk, K, moe.in_dtype, moe.options.batch_invariant)
        return WorkspaceShapes((M, topk, width), (M, topk, second), (M, K))

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        assert workspace13 is not None
        assert workspace2 is not None
        weights = None if apply_router_weight_on_input else topk_weights
        batch_invariant = self.moe_config.options.batch_invariant
        if torch.compiler.is_compiling():
            standard_op(
                output,
                hidden_states,
                a1q_scale,
                *flat(w1, w2, self.quant_config),
                weights,
                topk_ids,
                activation.value,
                *self.activation_config.numbers(),
                expert_map,
                workspace13,
                workspace2,
                batch_invariant,
                self.emulate,
            )
            return
        quantized_experts(
            output,
            hidden_states,
            self.operands(w1, w2, activation, output.dtype),
            weights,
            topk_ids,
            activation,
            self.activation_config,
            expert_map,
            workspace13,
            workspace2,
            x_scale=a1q_scale,
            batch_invariant=batch_invariant,
            tiles=self.tiles,
        )


class TritonEmulatedExperts(TritonQuantizedExperts):
    """As ``TritonQuantizedExperts`` for rows whose format no product here takes: they are rounded
    to it and multiplied as floats."""

    name = "triton_emulated"
    emulate = True

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return replace(
            super().capabilities(),
            weight_formats=frozenset(product(_WEIGHT_ONLY, ACTIVATION_KEYS)),
            emulated=frozenset(("activations", key) for key in ACTIVATION_KEYS),
        )


class BatchedTritonQuantizedExperts(_Quantized):
    """Batched rows; what moved the rows also weights and sums them."""

    name = "triton_quantized_batched"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return _capabilities(FusedMoEActivationFormat.BatchedExperts)

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> WorkspaceShapes:
        """The activation's output; M counts rows per expert."""
        width = self.adjust_N_for_activation(N, activation)
        return WorkspaceShapes((local_num_experts, M, width), (0,), (local_num_experts, M, K))

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceDelegate()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        counts = rows_per_expert(expert_tokens_meta, w1.shape[0])
        assert workspace13 is not None
        batch_invariant = self.moe_config.options.batch_invariant
        if torch.compiler.is_compiling():
            batched_op(
                output,
                hidden_states,
                *flat(w1, w2, self.quant_config),
                counts,
                activation.value,
                *self.activation_config.numbers(),
                workspace13,
                batch_invariant,
                self.emulate,
            )
            return
        batched_quantized_experts(
            output,
            hidden_states,
            self.operands(w1, w2, activation, hidden_states.dtype),
            counts,
            activation,
            self.activation_config,
            workspace13,
            batch_invariant=batch_invariant,
            tiles=self.tiles,
        )


def _capabilities(rows: FusedMoEActivationFormat) -> ExpertsCapabilities:
    batched = rows is FusedMoEActivationFormat.BatchedExperts
    # One scale for all rows would count the rows past each expert's number.
    pairs = {pair for pair in PAIRS if not (batched and pair[1] == FP8_DYNAMIC_TENSOR)}
    return ExpertsCapabilities(
        activation_format=rows,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        weight_formats=frozenset(pairs),
        min_capability=(8, 9),
        requires=("triton",),
        batch_invariant=True,
    )
