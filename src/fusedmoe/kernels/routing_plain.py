"""The commonest rule on the host in a few torch calls: softmax or sigmoid, top-k, renormalise.

Routing one token is all overhead there. Whatever makes ``torch.topk`` ambiguous (equal scores) or
wrong (NaN) is left to ``routing_reference``; everything else has its bits.

T tokens, E experts, K picks.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors


@lru_cache
def is_plain(spec: RoutingSpec) -> bool:
    """Whether ``spec`` asks for nothing but a score, the K largest, their sum and a factor."""
    plain = RoutingSpec(
        top_k=spec.top_k,
        num_experts=spec.num_experts,
        score_function=spec.score_function,
        renormalize=spec.renormalize,
        routed_scaling_factor=spec.routed_scaling_factor,
    )
    return spec == plain and spec.score_function in ("softmax", "sigmoid") and spec.num_experts > 1


def plain_routing(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors,
    is_padding: torch.Tensor | None,
    indices_dtype: torch.dtype,
) -> RoutingResult | None:
    """logits [T, E] -> weights fp32 and ids [T, K]; None where it takes the definition to tell."""
    has_tensors = any(tensor is not None for tensor in vars(tensors).values())
    if is_padding is not None or has_tensors or not is_plain(spec):
        return None
    x = logits.float()
    scores = torch.softmax(x, dim=-1) if spec.score_function == "softmax" else torch.sigmoid(x)
    K = spec.top_k
    best, ids = scores.topk(min(K + 1, spec.num_experts), dim=-1)
    if not bool((best[:, :-1] > best[:, 1:]).all()):
        return None
    weights = best[:, :K].contiguous()
    if spec.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if spec.routed_scaling_factor != 1.0:
        weights = weights * spec.routed_scaling_factor
    return RoutingResult(weights, ids[:, :K].to(indices_dtype))
