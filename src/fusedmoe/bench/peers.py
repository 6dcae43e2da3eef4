"""What this library is compared with: Transformers' experts, our definition in plain torch.

Two yardsticks beside them do less than a layer: ``torch_grouped_mm_alone`` and ``torch_mm``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fusedmoe.activation import MoEActivation, apply_moe_activation
from fusedmoe.bench.contestants import Contestant, Prepared, our_layer
from fusedmoe.bench.problems import Scope, Situation, Weights
from fusedmoe.bench.shapes import LayerShape

TRANSFORMERS_EXPERTS = ("eager", "batched_mm", "grouped_mm")
DENSE_SIZE = {"cuda": 8192, "cpu": 2048}


def transformers_experts(
    shape: LayerShape, weights: list[Weights], name: str, scope: Scope = "layer"
) -> Contestant:
    """Transformers' own experts module, forced to one of ``TRANSFORMERS_EXPERTS``."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("needs the module transformers, which is not installed")
    modules = [_transformers_module(shape, one, name) for one in weights]
    for module in modules:  # newer releases look for the id used below only where this is set
        module._is_expert_parallel = shape.ranks > 1

    def forward(module: Any, x: torch.Tensor, picked: torch.Tensor, ids: torch.Tensor) -> Any:
        if shape.ranks > 1:  # Transformers' id for an expert of another rank
            ids = ids.clamp(max=shape.E)
            picked = picked.masked_fill(ids == shape.E, 0.0)
        return module(x, ids, picked.to(x.dtype))

    def from_logits(module: Any, x: torch.Tensor, logits: torch.Tensor) -> Any:
        picked, ids = torch.softmax(logits.float(), dim=-1).topk(shape.k, dim=-1)
        return forward(module, x, picked / picked.sum(dim=-1, keepdim=True), ids)

    def prepare(index: int, x: torch.Tensor, situation: Situation) -> Prepared:
        if scope == "layer":
            return Prepared(partial(from_logits, modules[index], x, situation.logits))
        ids = situation.topk_ids.long()
        return Prepared(partial(forward, modules[index], x, situation.topk_weights, ids))

    def scratch_bytes(tokens: int) -> int | None:
        # batched_mm gathers the weights of every slot, for both products one after the other.
        per_slot = 2 * shape.H * shape.I * weights[0].w1.element_size()
        return tokens * shape.k * per_slot if name == "batched_mm" else None

    # The eager loop reads ids on the host.
    return Contestant(
        f"transformers_{name}", prepare, scope, True, scratch_bytes, in_graph=name != "eager"
    )


def _transformers_module(shape: LayerShape, weights: Weights, name: str) -> Any:
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    is_gpt_oss = shape.activation == "swigluoai"
    if shape.activation not in ("silu", "swigluoai") or is_gpt_oss != shape.bias:
        raise ValueError(f"no family has experts with {shape.activation} and bias={shape.bias}")
    config_cls, module_cls = (
        (GptOssConfig, GptOssExperts) if is_gpt_oss else (MixtralConfig, MixtralExperts)
    )
    config: Any = config_cls(
        num_local_experts=shape.E,
        num_experts_per_tok=shape.k,
        hidden_size=shape.H,
        intermediate_size=shape.I,
    )
    config._experts_implementation = name
    with torch.device("meta"):
        module: Any = module_cls(config)
    w1, w2 = weights.w1, weights.w2
    held = {"gate_up_proj": w1, "down_proj": w2}
    if is_gpt_oss:
        held = {"gate_up_proj": w1.transpose(1, 2), "down_proj": w2.transpose(1, 2)}
        assert weights.b1 is not None
        assert weights.b2 is not None
        held |= {"gate_up_proj_bias": weights.b1, "down_proj_bias": weights.b2}
    for key, value in held.items():
        setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
    return module


def torch_reference(
    shape: LayerShape, weights: list[Weights], scope: Scope = "layer"
) -> Contestant:
    """The definition that this library's kernels are compared with, in plain torch."""
    ours = our_layer(shape, weights, "torch", scope)
    return Contestant("torch_reference", ours.prepare, scope, True, in_graph=False)


def grouped_mm_alone(shape: LayerShape, weights: list[Weights]) -> Contestant:
    """``torch.nn.functional.grouped_mm`` twice and the activation between, on rows sorted before.

    What the two products cost in torch without routing, gathering, biases or sum.
    """
    if shape.bias:
        raise ValueError("leaves out the biases that this layer has")
    activation = MoEActivation.from_str(shape.activation)

    def prepare(index: int, x: torch.Tensor, situation: Situation) -> Prepared:
        one, ids = weights[index], situation.topk_ids.flatten().long()
        order = ids.argsort(stable=True)[: int((ids < shape.E).sum())]
        counts = torch.bincount(ids[order], minlength=shape.E)
        offsets = counts.cumsum(0).to(torch.int32)
        rows = x[order // shape.k].contiguous()
        act = x.new_empty(rows.shape[0], shape.I)

        def call() -> torch.Tensor:
            up = F.grouped_mm(rows, one.w1.transpose(1, 2), offs=offsets)
            apply_moe_activation(activation, act, up)
            return F.grouped_mm(act, one.w2.transpose(1, 2), offs=offsets)

        def finish(down: torch.Tensor) -> torch.Tensor:
            share = situation.topk_weights.flatten()[order, None]
            summed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            return summed.index_add_(0, order // shape.k, down.float() * share).to(x.dtype)

        return Prepared(call, finish)

    return Contestant("torch_grouped_mm_alone", prepare, "gemms", True)


def dense_product(weights: list[Weights]) -> Contestant:
    """A large square ``torch.mm`` of normal numbers: the rate a GPU holds while taking turns."""
    like = weights[0].w1
    n = DENSE_SIZE[like.device.type]
    a, b = (torch.empty(n, n, dtype=like.dtype, device=like.device).normal_() for _ in range(2))

    def prepare(index: int, x: torch.Tensor, situation: Situation) -> Prepared:
        return Prepared(partial(torch.mm, a, b))

    return Contestant("torch_mm", prepare, "dense", True, flops=2.0 * n**3)


def peer(
    name: str, shape: LayerShape, weights: list[Weights], scope: Scope = "layer"
) -> Contestant:
    """One of ``PEERS``; ValueError where it cannot run this layer here."""
    if name.startswith("transformers_"):
        return transformers_experts(shape, weights, name.removeprefix("transformers_"), scope)
    if name == "torch_reference":
        return torch_reference(shape, weights, scope)
    if name == "torch_grouped_mm_alone":
        return grouped_mm_alone(shape, weights)
    if name == "torch_mm":
        return dense_product(weights)
    raise ValueError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")


_OF_TRANSFORMERS = tuple(f"transformers_{name}" for name in TRANSFORMERS_EXPERTS)
PEERS: Sequence[str] = (*_OF_TRANSFORMERS, "torch_reference", "torch_grouped_mm_alone", "torch_mm")


def default_peers(device: torch.device) -> tuple[str, ...]:
    """Transformers' ways; on a GPU its loop, which reads ids on the host, makes place for torch's
    products alone and our reference."""
    if device.type == "cpu":
        return _OF_TRANSFORMERS
    graphs = tuple(name for name in _OF_TRANSFORMERS if not name.endswith("eager"))
    return (*graphs, "torch_grouped_mm_alone", "torch_reference")
