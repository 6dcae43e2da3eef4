"""Layers with quantized weights and rows, for tests: how to run them, and what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from expert_layers import Layer
from fusedmoe.activation import MoEActivation
from fusedmoe.experts.torch_quantized import quantized_experts_reference
from fusedmoe.experts.triton_quantized import TritonQuantizedExperts
from fusedmoe.modular_kernel import FusedMoEActivationFormat, FusedMoEKernel
from fusedmoe.prepare_finalize.batched import BatchedPrepareAndFinalize
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.config import FusedMoEQuantConfig, FusedMoEQuantDesc
from fusedmoe.quantization.keys import QuantKey
from packed_weights import pack

Tensors = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Quantized:
    """A layer, the format of its weights and how its rows are quantized.

    ``down``: the format of w2, where it is another. ``one_order``: act-order columns of gate and up
    are in the same groups. ``only``: whose rows are quantized, "w1" or "w2"; "": both.
    """

    format: str
    rows: QuantKey | None = None
    layer: Layer = field(default_factory=lambda: Layer(H=64, I=32))
    down: str | None = None
    one_order: bool = False
    only: str = ""

    def weights(self, tensors: Tensors) -> tuple[Any, Any]:
        act = self.layer.activation
        w1 = pack(
            tensors["w1"].float(),
            self.format,
            shards=2 if act.is_gated else 1,
            interleaved=act is MoEActivation.SWIGLUOAI,
            one_order=self.one_order,
        )
        return w1, pack(tensors["w2"].float(), self.down or self.format, seed=1)

    def config(
        self, tensors: Tensors, weights: tuple[Any, Any] | None = None
    ) -> tuple[Any, Any, FusedMoEQuantConfig]:
        w1, w2 = weights or self.weights(tensors)
        descs = [
            FusedMoEQuantDesc(
                dtype=w.format.key_dtype,
                format=w.format,
                scale=w.scale,
                scale2=w.scale2,
                zp=w.zero_point,
                group_index=w.group_index,
                bias=bias,
            )
            for w, bias in ((w1, tensors["w1_bias"]), (w2, tensors["w2_bias"]))
        ]
        rows = self.rows_desc(tensors["hidden_states"].device)
        a1, a2 = (rows if self.only in ("", name) else FusedMoEQuantDesc() for name in ("w1", "w2"))
        config = FusedMoEQuantConfig(a1=a1, a2=a2, w1=descs[0], w2=descs[1])
        return w1, w2, config

    def rows_desc(self, device: torch.device) -> FusedMoEQuantDesc:
        key = self.rows
        if key is None:
            return FusedMoEQuantDesc()
        scale = torch.full((1,), 0.03, device=device) if key.static else None
        return FusedMoEQuantDesc(
            dtype=key.dtype, shape=key.group_shape, scale=scale, scale_kind=key.scale_kind
        )

    def run(
        self,
        tensors: Tensors,
        experts_class: type = TritonQuantizedExperts,
        compiled: bool = False,
    ) -> torch.Tensor:
        """The experts between a prepare and a finalize."""
        return self.runner(tensors, experts_class, compiled)()

    def runner(
        self,
        tensors: Tensors,
        experts_class: type = TritonQuantizedExperts,
        compiled: bool = False,
        *,
        weights: tuple[Any, Any] | None = None,
        prepare: bool = False,
    ) -> Callable[[], torch.Tensor]:
        """The same, to be called again and again with what ``tensors`` hold then.

        ``weights`` are run instead of new ones; ``prepare``: as after loading. What is returned has
        ``experts``, ``weights`` and ``prepare`` (to be called again) as attributes.
        """
        layer = self.layer
        batched = experts_class.activation_format() is FusedMoEActivationFormat.BatchedExperts
        mover = (
            BatchedPrepareAndFinalize(layer.T + 3, layer.local or layer.E)
            if batched
            else MoEPrepareAndFinalizeNoDPEPModular()
        )
        w1, w2, config = self.config(tensors, weights)
        experts = experts_class(
            layer.config(),
            config,
            max_num_tokens=mover.max_num_tokens_per_rank() if batched else None,
            num_dispatchers=mover.num_dispatchers() if batched else None,
        )
        kernel = FusedMoEKernel(mover, experts)
        module = torch.nn.Module()
        module.w13_weight, module.w2_weight = w1.data, w2.data
        if prepare:
            experts.process_weights_after_loading(module)

        def apply(x, first, second, weights, ids):
            return kernel.apply(
                x,
                first,
                second,
                weights,
                ids,
                activation=layer.activation,
                global_num_experts=layer.E,
                expert_map=tensors["expert_map"],
                apply_router_weight_on_input=layer.weight_on_input,
            )

        if compiled:
            torch.compiler.reset()
            apply = torch.compile(apply, fullgraph=True, backend="aot_eager")

        def run():
            names = ("hidden_states", "topk_weights", "topk_ids")
            x, weights, ids = (tensors[name] for name in names)
            return apply(x, w1.data, w2.data, weights, ids)

        run.experts, run.weights = experts, (w1, w2)
        run.prepare = partial(experts.process_weights_after_loading, module)
        return run

    def expected(self, tensors: Tensors) -> torch.Tensor:
        w1, w2, config = self.config(tensors)
        return quantized_experts_reference(
            tensors["hidden_states"].double(),
            w1,
            w2,
            tensors["topk_weights"].double(),
            tensors["topk_ids"],
            a1=config.a1,
            a2=config.a2,
            activation=self.layer.activation,
            activation_config=self.layer.numbers,
            w1_bias=tensors["w1_bias"],
            w2_bias=tensors["w2_bias"],
            expert_map=tensors["expert_map"],
            apply_router_weight_on_input=self.layer.weight_on_input,
            compute_dtype=torch.float64,
        )
