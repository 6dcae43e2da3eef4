"""What is measured: a contestant, and this library's layer as one (the others are in peers.py).

Contestants compute one layer from router logits [T, E], or from given picks, to its output [T, H],
with the same weights and the same rule: softmax, the k largest, renormalised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from fusedmoe.bench.problems import Scope, Situation, Weights
from fusedmoe.bench.shapes import SWIGLUOAI_LIMIT, LayerShape
from fusedmoe.bench.timing import Call
from fusedmoe.config import MoEOptions, ParallelGroups
from fusedmoe.layer import FusedMoE
from fusedmoe.modular_kernel import FusedMoEActivationFormat, FusedMoEKernel
from fusedmoe.quantization.quantize_layer import quantize_layer
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.selection import EXPERTS, candidate_classes, name_of


def _same(output: torch.Tensor) -> torch.Tensor:
    return output


class Prepared(NamedTuple):
    """The call that is timed, and the one that turns its result into the layer's output."""

    call: Call
    finish: Callable[[torch.Tensor], torch.Tensor] = _same


Prepare = Callable[[int, torch.Tensor, Situation], Prepared]


@dataclass(frozen=True)
class Contestant:
    """``prepare``: (number of a set of weights, x [T, H], situation) -> what to call.

    ``scope`` is what one call covers: ``layer``, ``experts``, ``gemms`` (rows sorted already, no
    sum) or ``dense`` (another product, of ``flops``). ``scratch_bytes(T)``: what it needs beside
    weights, input and output, where that is known. ``in_graph``: whether a CUDA graph can hold it.
    ``format`` and ``weight_bytes``: of experts that are rounded to fewer bits, None for floats.
    """

    name: str
    prepare: Prepare
    scope: str
    is_peer: bool
    scratch_bytes: Callable[[int], int | None] = lambda tokens: None
    in_graph: bool = True
    flops: float | None = None
    format: str | None = None
    weight_bytes: int | None = None


def contestant_name(experts: str | type | None, format: str | None = None) -> str:
    """What reports call this library's layer with a forced implementation, or without (None), and
    with its experts in ``format``."""
    found = "fusedmoe"
    if experts is not None:
        found += f":{name_of(experts) if isinstance(experts, type) else experts}"
    return found if format is None else f"{found}@{format}"


def our_layer(
    shape: LayerShape,
    weights: list[Weights],
    experts: str | type | None = None,
    scope: Scope = "layer",
    options: MoEOptions | None = None,
    format: str | None = None,
    most_tokens: int | None = None,
) -> Contestant:
    """The layer with the implementation ``experts`` (None: the one that selection chooses).

    ``options`` replace that choice altogether. ``format``: the experts rounded to it, rows as they
    come. ``most_tokens``: how many batched experts have room for. Raises ValueError where it cannot
    run this layer.
    """
    options = options or MoEOptions(experts=experts)
    weight_bytes = None
    room = {"max_num_tokens": most_tokens} if _takes_batched_rows(options.experts) else {}
    if format is None:
        layers = [build_layer(shape, one, options, **room) for one in weights]
    else:
        layers = [_rounded_layer(shape, one, options, format, **room) for one in weights]
        method: Any = layers[0].routed_experts.quant_method
        weight_bytes = sum(w.nbytes for w in method.quantized_weights(layers[0].routed_experts))

    def prepare(index: int, x: torch.Tensor, situation: Situation) -> Prepared:
        layer = layers[index]
        if scope == "layer":
            return Prepared(partial(layer, x, situation.logits))
        run, picks = layer.routed_experts.forward_modular, situation[1:]
        return Prepared(partial(run, x, *picks, None, x))

    def scratch_bytes(tokens: int) -> int | None:
        routed = layers[0].routed_experts
        kernel = routed.quant_method.kernel(routed)
        return kernel.peak_workspace_bytes(tokens) if isinstance(kernel, FusedMoEKernel) else None

    name = contestant_name(experts, format)
    return Contestant(
        *(name, prepare, scope, False, scratch_bytes), format=format, weight_bytes=weight_bytes
    )


def _takes_batched_rows(experts: str | type | None) -> bool:
    if experts is None:
        return False
    (cls,) = candidate_classes(EXPERTS, experts)
    return bool(cls.activation_format() is FusedMoEActivationFormat.BatchedExperts)


def _rounded_layer(
    shape: LayerShape, weights: Weights, options: MoEOptions, format: str, **arguments: Any
) -> MoERunner:
    """Implementations may know floats or packed weights alone: the forced one comes in afterwards.

    ``weights`` stay as they are.
    """
    layer = build_layer(shape, weights, replace(options, experts="torch"), **arguments)
    experts: Any = layer.routed_experts
    experts.moe_config = replace(experts.moe_config, options=options)
    quantize_layer(layer, format)
    return layer


def build_layer(
    shape: LayerShape, weights: Weights, options: MoEOptions, **arguments: Any
) -> MoERunner:
    """One rank's layer of ``shape`` around ``weights``, which are not copied."""
    limit = SWIGLUOAI_LIMIT if shape.activation == "swigluoai" else None
    if shape.ranks > 1:
        arguments |= {
            "tp_size": shape.ranks,
            "tp_rank": 0,
            "parallel": ParallelGroups(enable_expert_parallel=True),
        }
    with weights.w1.device:
        layer = FusedMoE(
            shape.num_experts,
            shape.k,
            shape.H,
            shape.I,
            params_dtype=weights.w1.dtype,
            activation=shape.activation,
            swiglu_limit=limit,
            has_bias=shape.bias,
            options=options,
            **arguments,
        )
    routed = layer.routed_experts
    held = (
        ("w13_weight", weights.w1),
        ("w2_weight", weights.w2),
        ("w13_bias", weights.b1),
        ("w2_bias", weights.b2),
    )
    for name, value in held:
        if value is not None:
            setattr(routed, name, torch.nn.Parameter(value, requires_grad=False))
    routed.quant_method.process_weights_after_loading(routed)
    return layer
