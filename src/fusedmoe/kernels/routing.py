"""Routing: logits [T, E + Z] -> weights and ids [T, K], every step of a ``RoutingSpec`` at once.

On CUDA one launch: of most rules of many picks on Hopper ``kernels/cuda/routing_warp.cu``, of all
others ``kernels/triton/routing.py``; the number of tokens does not decide. Elsewhere
``routing_reference``, with a short cut for the commonest rule on the host
(``kernels/routing_plain.py``). The callers have checked shapes and dtypes
(``fusedmoe.router.route``).

Invariants: all arithmetic is fp32; equal scores go to the lower id; a slot without a selectable
expert, a padding row and a zero expert have id -1 and weight 0.

Notation: T tokens, K routed picks, E experts, Z zero experts, N fused shared experts, G groups.
"""

from __future__ import annotations

import torch

from fusedmoe.kernels.device import device_of, runs_hopper_cuda
from fusedmoe.kernels.routing_plain import plain_routing
from fusedmoe.router.spec import NUM_VISION_TOKEN_IDS, RoutingResult, RoutingSpec, RoutingTensors

# More candidates than this do not fit one Triton program.
MAX_TRITON_CANDIDATES = 4096
PICKS_IN_TURN = 4  # so few are found as fast one after the other, as the Triton kernel does
_LOWEST = float("-inf")


def routing(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors,
    *,
    input_ids: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    indices_dtype: torch.dtype = torch.int32,
) -> RoutingResult:
    """logits [T, E + Z] of any float dtype and stride -> weights fp32, ids [T, K + N].

    input_ids int [T] where the spec or its tensors ask for them, is_padding bool [T].
    """
    if logits.is_cuda and spec.num_experts + spec.num_zero_experts <= MAX_TRITON_CANDIDATES:
        from fusedmoe.kernels.triton.routing import routing_triton

        with device_of(logits):
            if spec.top_k > PICKS_IN_TURN and runs_hopper_cuda(logits.get_device()):
                from fusedmoe.kernels.cuda.routing_warp import routing_warp

                result = routing_warp(
                    logits, spec, tensors, is_padding=is_padding, indices_dtype=indices_dtype
                )
                if result is not None:
                    return result
            return routing_triton(
                logits, spec, tensors, input_ids=input_ids, is_padding=is_padding,
                indices_dtype=indices_dtype,
            )  # fmt: skip
    if logits.device.type == "cpu":
        plain = plain_routing(logits, spec, tensors, is_padding, indices_dtype)
        if plain is not None:
            return plain
    return routing_reference(
        logits, spec, tensors, input_ids=input_ids, is_padding=is_padding,
        indices_dtype=indices_dtype,
    )  # fmt: skip


def routing_reference(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors,
    *,
    input_ids: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    indices_dtype: torch.dtype = torch.int32,
) -> RoutingResult:
    """The definition, in plain torch; the steps are those listed in ``RoutingSpec``."""
    x = logits.float()
    if spec.logit_softcap:
        x = torch.tanh(x / spec.logit_softcap) * spec.logit_softcap
    if spec.selection == "sparsemixer":
        weights, ids = _sparsemixer(x, spec.sparsemixer_epsilon)
    else:
        scores = _scores(x, spec)
        ids = _choose(scores, spec, tensors, input_ids, is_padding)
        weights = _gather_weights(scores, ids, spec)
    if spec.renormalize:
        weights = weights / _denominator(weights, spec)
    weights = weights * spec.routed_scaling_factor
    if tensors.per_expert_scale is not None:
        factor = tensors.per_expert_scale.flatten().float()[ids.clamp(0, spec.num_experts - 1)]
        weights = torch.where(ids < spec.num_experts, weights * factor, weights)
    if is_padding is not None:
        ids = ids.masked_fill(is_padding[:, None], -1)
    weights = weights.masked_fill(ids < 0, 0.0)
    zero_expert_weight = None
    if spec.num_zero_experts:
        identity = ids >= spec.num_experts
        zero_expert_weight = weights.masked_fill(~identity, 0.0).sum(dim=-1)
        ids, weights = ids.masked_fill(identity, -1), weights.masked_fill(identity, 0.0)
    if spec.num_fused_shared_experts:
        shared = spec.num_experts, spec.num_fused_shared_experts, spec.shared_expert_weight
        weights, ids = append_shared_experts(weights, ids, *shared, is_padding)
    return RoutingResult(weights, ids.to(indices_dtype), zero_expert_weight)


def _scores(x: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    """What experts are compared by, [T, E + Z], finite or (not selectable) -inf."""
    if spec.score_after_topk:
        return x.masked_fill(~torch.isfinite(x), _LOWEST)
    return _apply_score_function(x, spec.score_function).nan_to_num_(0.0, 0.0, 0.0)


def _apply_score_function(x: torch.Tensor, score_function: str) -> torch.Tensor:
    if score_function == "softmax":
        return torch.softmax(x, dim=-1)
    if score_function == "sigmoid":
        return torch.sigmoid(x)
    if score_function == "sqrtsoftplus":
        return torch.sqrt(torch.nn.functional.softplus(x, threshold=20.0))
    return x.clone()


def _choose(
    scores: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors,
    input_ids: torch.Tensor | None,
    is_padding: torch.Tensor | None,
) -> torch.Tensor:
    """ids int64 [T, K], -1 where no expert is left to choose."""
    bias, vision_bias = tensors.correction_bias, tensors.vision_bias
    table = tensors.hash_indices_table
    choice = scores if bias is None else _add_bias(scores, bias)
    is_vision = None
    if vision_bias is not None and spec.image_sentinel_lo > 0:
        assert input_ids is not None
        offset = input_ids.long() - spec.image_sentinel_lo
        is_vision = ((offset >= 0) & (offset < NUM_VISION_TOKEN_IDS))[:, None]
        choice = torch.where(is_vision, _add_bias(scores, vision_bias), choice)
    if table is None:
        return _choose_best(choice, spec)
    assert input_ids is not None
    ids, invalid = _hash_ids(table, input_ids, scores.shape[1])
    if is_padding is not None:
        invalid = invalid & ~is_padding[:, None]
    if is_vision is not None:
        invalid = invalid & ~is_vision
        ids = torch.where(is_vision, _choose_best(choice, spec), ids)
    if invalid.device.type == "cpu" and bool(invalid.any()):
        row = int(invalid.any(dim=1).nonzero()[0])
        raise ValueError(
            f"hash routing of token {row}: input id {int(input_ids[row])} (table of "
            f"{table.shape[0]}) does not name experts in [-1, {scores.shape[1]})"
        )
    return ids


def _add_bias(scores: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (scores + bias.float().reshape(-1)).nan_to_num_(_LOWEST, float("inf"), _LOWEST)


def _choose_best(choice: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    groups = spec.num_expert_group
    if spec.selection == "topk_per_group":
        per_group = top_ids(choice.unflatten(1, (groups, -1)), spec.top_k // groups)
        first = torch.arange(groups, device=choice.device)[:, None] * (choice.shape[1] // groups)
        return torch.where(per_group >= 0, per_group + first, -1).flatten(1)
    if groups > 1 and spec.topk_group < groups:
        choice = _keep_best_groups(choice, spec)
    return top_ids(choice, spec.top_k)


def _keep_best_groups(choice: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    """-inf for the experts outside the ``topk_group`` best groups."""
    by_group = choice.unflatten(1, (spec.num_expert_group, -1))
    members = 1 if spec.group_score == "max" else min(2, by_group.shape[2])
    score = by_group.topk(members, dim=-1).values.sum(dim=-1)
    kept = top_ids(score.nan_to_num(_LOWEST, float("inf"), _LOWEST), spec.topk_group, fill=True)
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(1, kept, True)
    return by_group.masked_fill(~keep[:, :, None], _LOWEST).flatten(1)


def top_ids(choice: torch.Tensor, k: int, *, fill: bool = False) -> torch.Tensor:
    """Ids int64 [..., k] of the k largest of choice fp32 [..., E], largest first.

    Equal values go to the lower id. An entry of -inf is never chosen (its slot holds -1) unless
    ``fill``. NaN must not occur.
    """
    # One integer per entry, in the order of (value, -id): torch.topk alone leaves ties open.
    bits = (choice + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = choice.shape[-1] - 1
    reversed_id = last - torch.arange(last + 1, device=choice.device)
    keys = (ordered.long() << 32) | reversed_id
    best = keys.topk(k, dim=-1).values
    ids = last - (best & 0xFFFFFFFF)
    if fill:
        return ids
    return ids.masked_fill(choice.gather(-1, ids) == _LOWEST, -1)


def _hash_ids(
    table: torch.Tensor, input_ids: torch.Tensor, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [T, K], -1 wherever the token or the expert does not exist, and where that was."""
    rows = input_ids.long()[:, None]
    known = (rows >= 0) & (rows < table.shape[0])
    ids = table[rows[:, 0].clamp(0, table.shape[0] - 1)].long()
    valid = known & (ids >= -1) & (ids < num_candidates)
    return ids.masked_fill(~valid, -1), ~valid


def _gather_weights(scores: torch.Tensor, ids: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    """The unbiased scores of the chosen experts, 0 for empty slots."""
    chosen = scores.gather(1, ids.clamp_min(0))
    if spec.score_after_topk:
        chosen = chosen.masked_fill(ids < 0, _LOWEST)
        chosen = _apply_score_function(chosen, spec.score_function).nan_to_num_(0.0, 0.0, 0.0)
    return chosen.masked_fill_(ids < 0, 0.0)


def _sparsemixer(x: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rounds of: best expert, weighted by a softmax over those within 2 epsilon of it."""
    remaining = x.masked_fill(~torch.isfinite(x), _LOWEST)
    magnitude = x.abs()
    weights, ids = [], []
    for _ in range(2):
        chosen = top_ids(remaining, 1)
        best = remaining.gather(1, chosen.clamp_min(0))
        far = (best - remaining) / torch.maximum(magnitude, best) > 2 * epsilon
        near = torch.exp(remaining - best).masked_fill(far, 0.0)
        weights.append(1.0 / near.sum(dim=-1, keepdim=True))
        ids.append(chosen)
        remaining = remaining.scatter(1, chosen.clamp_min(0), _LOWEST)
    picked = torch.cat(ids, dim=1)
    return torch.cat(weights, dim=1).masked_fill(picked < 0, 0.0), picked


def _denominator(weights: torch.Tensor, spec: RoutingSpec) -> torch.Tensor:
    if spec.renormalize_norm == 1.0:
        norm = weights.sum(dim=-1, keepdim=True)
    else:
        norm = torch.linalg.vector_norm(weights, spec.renormalize_norm, dim=-1, keepdim=True)
    norm = (norm + spec.renormalize_epsilon).clamp_min(spec.renormalize_floor)
    return torch.where(norm > 0, norm, 1.0)


def append_shared_experts(
    weights: torch.Tensor,
    ids: torch.Tensor,
    first_id: int,
    count: int,
    shared_weight: float,
    is_padding: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [T, K] with experts first_id .. first_id + count - 1 appended to each row."""
    shape = (ids.shape[0], count)
    shared_ids = torch.arange(first_id, first_id + count, dtype=ids.dtype, device=ids.device)
    shared_ids = shared_ids.expand(shape)
    shared_weights = weights.new_full(shape, shared_weight)
    if is_padding is not None:
        shared_ids = shared_ids.masked_fill(is_padding[:, None], -1)
        shared_weights = shared_weights.masked_fill(is_padding[:, None], 0.0)
    return torch.cat((weights, shared_weights), dim=1), torch.cat((ids, shared_ids), dim=1)
