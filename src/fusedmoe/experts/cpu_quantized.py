"""Quantized experts on a CPU that stay packed: int4 and int8 weights, int8 activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.cpu_int4 import Int4Weight, float_rows, int4_linear, int4_linears, unmet_int4
from fusedmoe.experts.cpu_int8 import byte_rows, half_rows, int8_linear, int8_linears, unmet_int8
from fusedmoe.experts.cpu_packing import current, packed_or_copy
from fusedmoe.experts.cpu_plan import Route
from fusedmoe.experts.cpu_run import Layer, Products, cpu_shapes, run_layer
from fusedmoe.experts.functional_call import run_opaque
from fusedmoe.experts.packed_weight import (
    CPU_QUANTIZED,
    Packed,
    packed_of,
    packing,
    unpack,
    was_packed,
)
from fusedmoe.experts.quantized_operands import quantized_pair
from fusedmoe.experts.torch_quantized import TorchQuantizedExperts
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    ProblemSize,
    WorkspaceShapes,
)
from fusedmoe.quantization.desc import FusedMoEQuantDesc
from fusedmoe.quantization.formats.keys import INTEGER_WEIGHTS
from fusedmoe.quantization.keys import INT8_DYNAMIC_TOKEN, INT8_STATIC_TENSOR, PER_CHANNEL, QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor

Encoder = Callable[[torch.Tensor], Any]
"""Makes of floats the rows that enter a product."""

_INT8_CHANNEL = QuantKey(torch.int8, True, PER_CHANNEL)


class CpuQuantizedExperts(TorchQuantizedExperts):
    """The default for integer weights on a CPU: held once, in the layout that kernels read.

    ``process_weights_after_loading`` makes packed weights (``packed_weight.py``) of ``w13_weight``
    and ``w2_weight``, one after the other. Whoever reads or writes their numbers gets them back as
    they were loaded, and the next forward packs them again. Where somebody else has their memory
    too (a view, another process) there is a second copy until they let go; the reference runs
    without the memory for it, and where the weights were written to since. All is fp32, but int4
    products give bf16. Scales of int4 groups that bf16 does not hold cost a second product.
    """

    name = CPU_QUANTIZED
    derived = ("_copies", "_encoders")
    _copies: tuple[Packed | None, Packed | None] = (None, None)
    _encoders: tuple[Encoder, Encoder] | None = None

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        alone = {(key, None) for key in INTEGER_WEIGHTS}
        return ExpertsCapabilities(
            devices=frozenset({"cpu"}),
            weight_formats=frozenset(
                alone | {(_INT8_CHANNEL, INT8_DYNAMIC_TOKEN), (_INT8_CHANNEL, INT8_STATIC_TENSOR)}
            ),
            batch_invariant=True,
        )

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        assert weight_key is not None  # no layer of floats comes past the capabilities
        if weight_key.dtype == torch.int8:
            return unmet_int8()
        hidden, width = moe.hidden_dim, moe.intermediate_size_per_partition
        g = weight_key.group_shape.col
        return unmet_int4(width, hidden, g) or unmet_int4(hidden, width, g)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if torch.compiler.is_compiling():
            return
        weights: Any = layer
        self._pack(weights.w13_weight, weights.w2_weight)

    def _pack(self, w13: torch.Tensor, w2: torch.Tensor) -> None:
        config, moe = self.quant_config, self.moe_config
        self._copies = (None, None)
        up, down = quantized_pair(w13, w2, config, moe.activation, moe.in_dtype)
        self._copies = (packed_or_copy(up, config.w1), packed_or_copy(down, config.w2))
        self._encoders = (
            _encoder(up, config.a1, exact=moe.in_dtype is torch.bfloat16),
            _encoder(down, config.a2, exact=False),
        )

    def _products(self, w1: torch.Tensor, w2: torch.Tensor) -> Products | None:
        """The products with these weights, packed again if something has read their numbers."""
        found = self._found(w1, w2)
        if (found is None or self._encoders is None) and was_packed(w1) and was_packed(w2):
            with packing:
                found = self._found(w1, w2) if self._encoders else None
                if found is None:
                    self._pack(w1, w2)
                    found = self._found(w1, w2)
        if found is None or self._encoders is None:
            return None
        first, second = found
        return Products(_linear, first.weights, second.weights, *self._encoders, _linears)

    def _found(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[Packed, Packed] | None:
        """What was made of both weights as they are now."""
        config, (up, down) = self.quant_config, self._copies
        first, second = current(w1, config.w1, up), current(w2, config.w2, down)
        if up is not None or down is not None:  # copies that replaced the weights belong to them
            self._copies = (
                None if packed_of(w1) is up else up,
                None if packed_of(w2) is down else down,
            )
        return None if first is None or second is None else (first, second)

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        return cpu_shapes(size, self.moe_config.in_dtype)

    def run(self, work: ExpertsWork) -> None:
        if torch.compiler.is_compiling():
            run_opaque(self, self.name, work)
            return
        products = self._products(work.w1, work.w2)
        if products is None:
            unpack(work.w1)
            unpack(work.w2)
            super().run(work)
            return
        e, up_width, _ = work.w1.shape
        biases, scratch = (self.quant_config.w1_bias, self.quant_config.w2_bias), work.workspace13
        layer = Layer(products, *biases, work.activation, self.activation_config, up_width)
        work.output.copy_(
            run_layer(
                layer,
                Route.make(e, work.expert_map, work.global_num_experts),
                work.hidden_states.float(),
                work.output_weights_or_ones.float(),
                work.topk_ids,
                self.moe_config.options.batch_invariant,
                None if scratch is None else scratch.view(torch.float32),
            )
        )


def _linear(rows: Any, weight: Any, out: torch.Tensor) -> None:
    linear = int4_linear if isinstance(weight, Int4Weight) else int8_linear
    linear(rows, weight, out)


def _linears(rows: Any, weights: Sequence[Any]) -> torch.Tensor:
    return (int4_linears if isinstance(weights[0], Int4Weight) else int8_linears)(rows, weights)


def _encoder(q: QuantizedTensor, activation: FusedMoEQuantDesc, exact: bool) -> Encoder:
    """What makes the rows that enter products with ``q``; ``exact``: they are bf16."""
    if q.format.element == "int8" and activation.key is not None:
        return partial(byte_rows, scale=activation.scale)
    return row_encoder(q, exact=exact)


def row_encoder(q: QuantizedTensor, *, exact: bool) -> Encoder:
    """What makes the rows of floats that enter products with ``q``; ``exact``: they are bf16."""
    columns = q.shape[-1] if q.format.group.col == -1 else q.format.group.col
    g = 0 if q.zero_point is None or q.format.act_order else columns
    if q.format.element == "int8":
        return partial(half_rows, g=g)
    return partial(float_rows, g=g, exact=exact)
