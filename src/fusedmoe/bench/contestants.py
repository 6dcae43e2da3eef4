"""The implementations that are compared: this library's layer, and Transformers' experts.

All of them go from router logits [T, E] to the layer's output [T, H], with the same weights and the
same rule: softmax, the k largest, renormalised.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fusedmoe.bench.shapes import LayerShape
from fusedmoe.config import MoEOptions
from fusedmoe.layer import FusedMoE
from fusedmoe.modular_kernel import FusedMoEKernel
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.selection import name_of

TRANSFORMERS_EXPERTS = ("eager", "batched_mm", "grouped_mm")
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """w1 [E, 2I, H] and w2 [E, H, I] of one layer."""

    w1: torch.Tensor
    w2: torch.Tensor


@dataclass(frozen=True)
class Contestant:
    """``forwards``: one per set of weights, (x [T, H], logits [T, E]) -> [T, H].

    ``scratch_bytes(T)``: what it needs beside weights, input and output, where that is known.
    """

    name: str
    forwards: list[Forward]
    scratch_bytes: Callable[[int], int | None]
    is_peer: bool


def random_weights(
    shape: LayerShape, dtype: torch.dtype, device: torch.device, copies: int
) -> list[Weights]:
    """Independent sets of normal weights that keep the size of what goes through them."""

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, size[-1] ** -0.5)

    return [
        Weights(normal(shape.E, 2 * shape.I, shape.H), normal(shape.E, shape.H, shape.I))
        for _ in range(copies)
    ]


def our_layer(
    shape: LayerShape, weights: list[Weights], experts: str | type | None = None
) -> Contestant:
    """The layer with the implementation ``experts`` (None: the one that selection chooses).

    Raises ValueError where that one cannot run this layer.
    """
    layers = [_build_layer(shape, one, experts) for one in weights]

    def scratch_bytes(tokens: int) -> int | None:
        routed = layers[0].routed_experts
        kernel = routed.quant_method.kernel(routed)
        return kernel.peak_workspace_bytes(tokens) if isinstance(kernel, FusedMoEKernel) else None

    return Contestant(contestant_name(experts), list(layers), scratch_bytes, is_peer=False)


def contestant_name(experts: str | type | None) -> str:
    """What reports call this library's layer with a forced implementation, or without (None)."""
    if experts is None:
        return "fusedmoe"
    return f"fusedmoe:{name_of(experts) if isinstance(experts, type) else experts}"


def _build_layer(shape: LayerShape, weights: Weights, experts: str | type | None) -> MoERunner:
    layer = FusedMoE(
        shape.E,
        shape.k,
        shape.H,
        shape.I,
        params_dtype=weights.w1.dtype,
        options=MoEOptions(experts=experts),
    )
    routed = layer.routed_experts
    for name, value in (("w13_weight", weights.w1), ("w2_weight", weights.w2)):
        setattr(routed, name, torch.nn.Parameter(value, requires_grad=False))
    routed.quant_method.process_weights_after_loading(routed)
    return layer


def transformers_experts(shape: LayerShape, weights: list[Weights], name: str) -> Contestant:
    """Transformers' own experts module, forced to one of ``TRANSFORMERS_EXPERTS``."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("needs the module transformers, which is not installed")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        num_local_experts=shape.E,
        num_experts_per_tok=shape.k,
        hidden_size=shape.H,
        intermediate_size=shape.I,
    )
    config._experts_implementation = name

    def forward_with(one: Weights) -> Forward:
        with torch.device("meta"):
            module: Any = MixtralExperts(config)
        module.gate_up_proj = torch.nn.Parameter(one.w1, requires_grad=False)
        module.down_proj = torch.nn.Parameter(one.w2, requires_grad=False)

        def forward(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            scores = torch.softmax(logits.float(), dim=-1)
            picked, ids = scores.topk(shape.k, dim=-1)
            picked = picked / picked.sum(dim=-1, keepdim=True)
            return module(x, ids, picked.to(x.dtype))

        return forward

    def scratch_bytes(tokens: int) -> int | None:
        # batched_mm gathers the weights of every slot, for both products one after the other.
        per_slot = 2 * shape.H * shape.I * weights[0].w1.element_size()
        return tokens * shape.k * per_slot if name == "batched_mm" else None

    forwards = [forward_with(one) for one in weights]
    return Contestant(f"transformers_{name}", forwards, scratch_bytes, is_peer=True)
