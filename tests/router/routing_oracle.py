"""Routing once more, written as loops over Python floats, token by token, expert by expert.

Shares nothing with the library but the records; scores are fp64, rounded to fp32 before they are
compared, because equal fp32 scores are ties.
"""

import math

import numpy as np
import torch

from fusedmoe.router.spec import RoutingSpec, RoutingTensors

INF = math.inf


def as_fp32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def scored(logits: list[float], score_function: str) -> list[float]:
    if score_function == "softmax":
        if any(math.isnan(x) or x == INF for x in logits) or all(x == -INF for x in logits):
            return [0.0] * len(logits)
        largest = max(logits)
        powers = [math.exp(x - largest) for x in logits]
        return [as_fp32(power / math.fsum(powers)) for power in powers]
    scores = []
    for x in logits:
        if math.isnan(x):
            score = math.nan
        elif score_function == "sigmoid":
            score = 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0
        elif score_function == "sqrtsoftplus":
            score = math.sqrt(x if x > 20 else math.log1p(math.exp(x)))
        else:
            score = x
        scores.append(as_fp32(score) if math.isfinite(score) else 0.0)
    return scores


def best(choices: dict[int, float], count: int) -> list[int]:
    """The ids of the largest choices, lower id first among equals, without those at -inf."""
    order = sorted(expert for expert in choices if choices[expert] != -INF)
    return sorted(order, key=lambda expert: -choices[expert])[:count]


def group_worth(members: list[float], rule: str) -> float:
    top = sorted(members, reverse=True)[: 1 if rule == "max" else 2]
    total = as_fp32(sum(top))
    return -INF if math.isnan(total) else total


def chosen_ids(choice: list[float], spec: RoutingSpec) -> list[int]:
    groups = spec.num_expert_group or 1
    size = len(choice) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    if spec.selection == "topk_per_group":
        ids = []
        for group in members:
            found = best({expert: choice[expert] for expert in group}, spec.top_k // groups)
            ids += found + [-1] * (spec.top_k // groups - len(found))
        return ids
    kept = list(range(groups))
    if groups > 1:
        worth = [group_worth([choice[e] for e in group], spec.group_score) for group in members]
        kept = sorted(kept, key=lambda group: -worth[group])[: spec.topk_group]
    return best({e: choice[e] for group in kept for e in members[group]}, spec.top_k)


def sparsemixer(logits: list[float], epsilon: float) -> tuple[list[int], list[float]]:
    left = {e: x for e, x in enumerate(logits) if math.isfinite(x)}
    ids, weights = [], []
    for _ in range(2):
        if not left:
            break
        winner = best(left, 1)[0]
        top = left[winner]
        near = 0.0
        for x in left.values():
            scale = max(abs(x), top)
            if not (scale != 0 and (top - x) / scale > 2 * epsilon):
                near += math.exp(x - top)
        ids.append(winner)
        weights.append(1.0 / near)
        del left[winner]
    return ids, weights


def norm_of(weights: list[float], p: float) -> float:
    if p == 1.0:
        return sum(weights)
    if p == INF:
        return max(abs(w) for w in weights)
    return sum(abs(w) ** p for w in weights) ** (1 / p)


def plus_bias(scores: list[float], bias: torch.Tensor | None) -> list[float]:
    if bias is None:
        return scores
    sums = [as_fp32(s + b) for s, b in zip(scores, bias.double().flatten().tolist(), strict=True)]
    return [-INF if math.isnan(total) else total for total in sums]


def route_token(
    logits: list[float],
    spec: RoutingSpec,
    tensors: RoutingTensors,
    input_id: int | None,
    is_padding: bool,
) -> tuple[list[int], list[float], float]:
    slots = spec.top_k + spec.num_fused_shared_experts
    if is_padding:
        return [-1] * slots, [0.0] * slots, 0.0
    if spec.logit_softcap:
        logits = [spec.logit_softcap * math.tanh(x / spec.logit_softcap) for x in logits]
    if spec.selection == "sparsemixer":
        ids, weights = sparsemixer(logits, spec.sparsemixer_epsilon)
    else:
        if spec.score_after_topk:
            scores = [as_fp32(x) if math.isfinite(x) else -INF for x in logits]
        else:
            scores = scored(logits, spec.score_function)
        lo = spec.image_sentinel_lo
        is_image = tensors.vision_bias is not None and lo > 0 and lo <= (input_id or 0) < lo + 5
        if is_image:
            ids = chosen_ids(plus_bias(scores, tensors.vision_bias), spec)
        elif tensors.hash_indices_table is not None:
            ids = tensors.hash_indices_table[input_id].tolist()
        else:
            ids = chosen_ids(plus_bias(scores, tensors.correction_bias), spec)
        picked = [scores[e] if e >= 0 else (-INF if spec.score_after_topk else 0.0) for e in ids]
        if spec.score_after_topk:
            picked = scored(picked, spec.score_function)
        weights = [w if e >= 0 else 0.0 for e, w in zip(ids, picked, strict=True)]
    ids = ids + [-1] * (spec.top_k - len(ids))
    weights = weights + [0.0] * (spec.top_k - len(weights))
    if spec.renormalize:
        total = max(
            norm_of(weights, spec.renormalize_norm) + spec.renormalize_epsilon,
            spec.renormalize_floor,
        )
        weights = [w / total if total > 0 else w for w in weights]
    zero = 0.0
    for slot, expert in enumerate(ids):
        weights[slot] *= spec.routed_scaling_factor
        if tensors.per_expert_scale is not None and 0 <= expert < spec.num_experts:
            weights[slot] *= float(tensors.per_expert_scale[expert])
        if expert >= spec.num_experts:
            zero += weights[slot]
            ids[slot], weights[slot] = -1, 0.0
    for extra in range(spec.num_fused_shared_experts):
        ids.append(spec.num_experts + extra)
        weights.append(spec.shared_expert_weight)
    return ids, weights, zero


def route_oracle(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors | None = None,
    input_ids: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weights fp64 [T, K + N], ids int64 [T, K + N], zero weight fp64 [T]."""
    tensors = tensors or RoutingTensors()
    ids, weights, zeros = [], [], []
    for token in range(logits.shape[0]):
        token_ids, token_weights, zero = route_token(
            logits[token].double().tolist(),
            spec,
            tensors,
            None if input_ids is None else int(input_ids[token]),
            is_padding is not None and bool(is_padding[token]),
        )
        ids.append(token_ids)
        weights.append(token_weights)
        zeros.append(zero)
    slots = spec.top_k + spec.num_fused_shared_experts
    return (
        torch.tensor(weights, dtype=torch.float64).reshape(-1, slots),
        torch.tensor(ids, dtype=torch.int64).reshape(-1, slots),
        torch.tensor(zeros, dtype=torch.float64),
    )
