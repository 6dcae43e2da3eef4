"""Quantized experts on a CPU that stay packed: int4 and int8 weights, int8 activations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.copies import Source, room_for
from fusedmoe.experts.cpu_int4 import (
    float_rows,
    int4_linear,
    int4_linears,
    int4_weights,
    unmet_int4,
)
from fusedmoe.experts.cpu_int8 import (
    byte_rows,
    half_rows,
    int8_linear,
    int8_linears,
    int8_weights,
    unmet_int8,
)
from fusedmoe.experts.cpu_plan import Route
from fusedmoe.experts.cpu_run import Layer, Products, run_layer, scratch_rows
from fusedmoe.experts.quantized_operands import quantized_pair
from fusedmoe.experts.torch_quantized import TorchQuantizedExperts
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    WorkspaceShapes,
)
from fusedmoe.quantization.desc import FusedMoEQuantDesc
from fusedmoe.quantization.formats.keys import INTEGER_WEIGHTS
from fusedmoe.quantization.keys import (
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    PER_CHANNEL,
    QuantKey,
)
from fusedmoe.quantization.tensor import QuantizedTensor

_INT8_CHANNEL = QuantKey(torch.int8, True, PER_CHANNEL)
_log = logging.getLogger(__name__)


class CpuQuantizedExperts(TorchQuantizedExperts):
    """The default for integer weights on a CPU: a copy of them in the layout that kernels read.

    Without the memory for it, or where weights have been written to since, and in compiled code,
    the reference runs instead. All is fp32, but int4 products give bf16. Scales of int4 groups that
    bf16 does not hold cost a second product.
    """

    name = "cpu_quantized"
    derived = ("_packed", "_sources")
    _packed: Products | None = None
    _sources: tuple[Source, ...] = ()

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        plain = {(key, None) for key in INTEGER_WEIGHTS if not key.act_order}
        return ExpertsCapabilities(
            devices=frozenset({"cpu"}),
            weight_formats=frozenset(
                plain | {(_INT8_CHANNEL, INT8_DYNAMIC_TOKEN), (_INT8_CHANNEL, INT8_STATIC_TENSOR)}
            ),
            batch_invariant=True,
        )

    @classmethod
    def is_supported_config(
        cls,
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        able, reason = super().is_supported_config(
            moe_config, weight_key, activation_key, activation_format
        )
        if not able or weight_key is None:
            return able, reason
        if weight_key.dtype == torch.int8:
            reason = unmet_int8()
        else:
            hidden, width = moe_config.hidden_dim, moe_config.intermediate_size_per_partition
            g = weight_key.group_shape.col
            reason = unmet_int4(width, hidden, g) or unmet_int4(hidden, width, g)
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if torch.compiler.is_compiling():
            return
        weights: Any = layer
        w13, w2 = weights.w13_weight, weights.w2_weight
        self._packed, self._sources = None, ()
        if not room_for(w13.nbytes + w2.nbytes):
            _log.info("no memory to spare for packed expert weights: they are dequantized instead")
            return
        self._packed = self._products(w13.detach(), w2.detach())
        self._sources = self._sources_of(w13, w2)

    def _sources_of(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[Source, ...]:
        config = self.quant_config
        parts = (w1, w2, config.w1.scale, config.w2.scale, config.w1.zp, config.w2.zp)
        return tuple(Source.of(part) for part in parts if part is not None)

    def _products(self, w13: torch.Tensor, w2: torch.Tensor) -> Products:
        config = self.quant_config
        up, down = quantized_pair(
            w13, w2, config, self.moe_config.activation, self.moe_config.in_dtype
        )
        exact = self.moe_config.in_dtype is torch.bfloat16
        first, second = _product(up, config.a1, exact), _product(down, config.a2, False)
        if first[0] is second[0]:
            linears: Any = int8_linears if first[0] is int8_linear else int4_linears
            return Products(first[0], first[1], second[1], first[2], second[2], linears)

        def linear(rows: Any, weight: Any, out: torch.Tensor) -> None:
            """The two weights are of different kinds: each names its own product."""
            weight[0](rows, weight[1], out)

        return Products(
            linear,
            [(first[0], one) for one in first[1]],
            [(second[0], one) for one in second[1]],
            first[2],
            second[2],
        )

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
        per_float = torch.float32.itemsize // self.moe_config.in_dtype.itemsize
        return WorkspaceShapes((scratch_rows(M, topk, K), K * per_float), (0,), (M, K))

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
        packed = self._packed
        compiling = torch.compiler.is_compiling()
        if compiling or packed is None or self._sources_of(w1, w2) != self._sources:
            super().apply(
                output,
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                activation,
                global_num_experts,
                expert_map,
                a1q_scale,
                a2_scale,
                workspace13,
                workspace2,
                expert_tokens_meta,
                apply_router_weight_on_input,
            )
            return
        weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        layer = Layer(
            packed,
            self.quant_config.w1_bias,
            self.quant_config.w2_bias,
            activation,
            self.activation_config,
            w1.shape[1],
        )
        output.copy_(
            run_layer(
                layer,
                Route.make(w1.shape[0], expert_map, global_num_experts),
                hidden_states.float(),
                weights.float(),
                topk_ids,
                self.moe_config.options.batch_invariant,
                None if workspace13 is None else workspace13.view(torch.float32),
            )
        )


def _product(
    q: QuantizedTensor, activation: FusedMoEQuantDesc, exact: bool
) -> tuple[Any, Any, Any]:
    """(linear, one weight per expert, what makes its rows) for one of the two weights.

    ``exact``: the rows are bf16.
    """
    encode = row_encoder(q, exact=exact)
    if q.format.element == "int4":
        return int4_linear, int4_weights(q), encode
    if activation.key is not None:
        encode = partial(byte_rows, scale=activation.scale)
    return int8_linear, int8_weights(q), encode


def row_encoder(q: QuantizedTensor, *, exact: bool) -> Callable[[torch.Tensor], Any]:
    """What makes the rows of floats that enter products with ``q``; ``exact``: they are bf16."""
    columns = q.shape[-1] if q.format.group.col == -1 else q.format.group.col
    g = 0 if q.zero_point is None else columns
    if q.format.element == "int8":
        return partial(half_rows, g=g)
    return partial(float_rows, g=g, exact=exact)
