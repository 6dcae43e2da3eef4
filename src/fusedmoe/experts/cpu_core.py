"""The routed experts of one layer on a CPU, as one function of tensors.

Slots (t, k) are sorted by expert once. Consecutive experts with few rows share a block of scratch
rows, so that the activation runs over many rows at a time; an expert with many rows is a block of
its own. Every weight is read once, scratch does not grow with T.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K routed rows, S = 2 where the
activation is gated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.experts.cpu_gemm import expert_linear
from fusedmoe.kernels.ids import local_ids

BLOCK_ROWS = 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Linear = Callable[[torch.Tensor, int], torch.Tensor]
"""Rows [M, in] and a local expert -> [M, out]."""


class ExpertLinears(NamedTuple):
    """The two products of each expert, and their biases [e, S * I] and [e, H]."""

    up: Linear
    down: Linear
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class SortedSlots(NamedTuple):
    """slots int64 [<= R]: the routed slots t * K + k, by expert; ``counts``: rows per expert."""

    slots: torch.Tensor
    counts: list[int]


class Block(NamedTuple):
    """Rows [start, stop) of the sorted slots; ``experts``: (local expert, rows) in order."""

    start: int
    stop: int
    experts: list[tuple[int, int]]


def cpu_fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    global_num_experts: int = -1,
    apply_router_weight_on_input: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """hidden_states [T, H], w1 [e, S * I, H], w2 [e, H, I] -> [T, H]; no gradient flows.

    fp32, fp16 or bf16, all three alike; weights may have any strides. topk_weights fp32 [T, K],
    topk_ids int [T, K] in [-1, global_num_experts), -1 being no expert; global_num_experts -1 means
    the length of ``expert_map`` (int32, global -> local id or -1), else e.
    ``apply_router_weight_on_input`` (K = 1) weights the rows that enter. ``batch_invariant``
    computes every token alone, which makes its bits independent of the others, and T > 1 slow.

    Raises ValueError for shapes or dtypes that disagree and for ids out of range.
    """
    _check(hidden_states, w1, w2, topk_weights, topk_ids, activation, w1_bias, w2_bias)
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(
            f"apply_router_weight_on_input needs top-1 routing, got K = {topk_ids.shape[1]}"
        )
    numbers = activation_config or ApplyMoEActivationConfig()
    call = _op if torch.compiler.is_compiling() else _run
    return call(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation.value,
        numbers.clamp_limit,
        numbers.alpha,
        numbers.beta,
        numbers.situ_beta,
        numbers.situ_linear_beta,
        w1_bias,
        w2_bias,
        expert_map,
        global_num_experts,
        apply_router_weight_on_input,
        batch_invariant,
    )


def _run(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    clamp_limit: float | None,
    alpha: float | None,
    beta: float | None,
    situ_beta: float | None,
    situ_linear_beta: float | None,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    global_num_experts: int,
    apply_router_weight_on_input: bool,
    batch_invariant: bool,
) -> torch.Tensor:
    config = ApplyMoEActivationConfig(
        clamp_limit=clamp_limit,
        alpha=alpha,
        beta=beta,
        situ_beta=situ_beta,
        situ_linear_beta=situ_linear_beta,
    )
    linears = ExpertLinears(
        lambda rows, expert: expert_linear(rows, w1[expert]),
        lambda rows, expert: expert_linear(rows, w2[expert]),
        w1_bias,
        w2_bias,
    )
    ids = checked_local_ids(topk_ids, w1.shape[0], expert_map, global_num_experts)
    x, weights = hidden_states, topk_weights.float()
    if apply_router_weight_on_input:
        x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
    return run_experts(
        x, weights, ids, w1.shape[0], linears, MoEActivation(activation), config, batch_invariant
    )


def run_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    local_topk_ids: torch.Tensor,
    num_experts: int,
    linears: ExpertLinears,
    activation: MoEActivation,
    config: ApplyMoEActivationConfig,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [T, H], weights fp32 [T, K], ids int64 [T, K] in [-1, num_experts) -> [T, H] like x."""
    T = x.shape[0]
    if batch_invariant and T > 1:
        alone = [
            run_experts(
                x[t : t + 1].clone(),
                topk_weights[t : t + 1],
                local_topk_ids[t : t + 1],
                num_experts,
                linears,
                activation,
                config,
            )
            for t in range(T)
        ]
        return torch.cat(alone)
    slots, counts = sort_slots(local_topk_ids, num_experts)
    token = slots // local_topk_ids.shape[1]
    weights = topk_weights.flatten()[slots, None]
    total = torch.zeros(x.shape, dtype=torch.float32)
    for block in blocks_of(counts):
        tokens = token[block.start : block.stop]
        down = _run_block(x[tokens], block, linears, activation, config)
        total.index_add_(0, tokens, down.mul_(weights[block.start : block.stop]))
    return total.to(x.dtype)


def _run_block(
    rows: torch.Tensor,
    block: Block,
    linears: ExpertLinears,
    activation: MoEActivation,
    config: ApplyMoEActivationConfig,
) -> torch.Tensor:
    """The unweighted expert outputs of a block's rows, fp32, contiguous, its own memory."""
    up = _per_expert(rows, block, linears.up, linears.up_bias)
    middle = activation_reference(activation, up, config).to(rows.dtype)
    down = _per_expert(middle, block, linears.down, linears.down_bias)
    return down.float().contiguous()


def _per_expert(
    rows: torch.Tensor, block: Block, linear: Linear, bias: torch.Tensor | None
) -> torch.Tensor:
    """Every expert's rows through its own product, in order; with a bias the result is fp32."""
    if len(block.experts) == 1:
        out = linear(rows, block.experts[0][0])
    else:
        parts = rows.split([count for _, count in block.experts])
        out = torch.cat(
            [linear(part, e) for part, (e, _) in zip(parts, block.experts, strict=True)]
        )
    if bias is None:
        return out
    experts = torch.tensor([e for e, _ in block.experts])
    counts = torch.tensor([count for _, count in block.experts])
    return out.float() + bias[experts].float().repeat_interleave(counts, dim=0)


def blocks_of(counts: list[int], block_rows: int = BLOCK_ROWS) -> Iterator[Block]:
    """Cut the sorted rows into blocks of whole experts, of ``block_rows`` where experts allow."""
    start = stop = 0
    experts: list[tuple[int, int]] = []
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        if experts and stop - start + count > block_rows:
            yield Block(start, stop, experts)
            start, experts = stop, []
        experts.append((expert, count))
        stop += count
    if experts:
        yield Block(start, stop, experts)


def sort_slots(local_topk_ids: torch.Tensor, num_experts: int) -> SortedSlots:
    """Slots by expert, those of one expert in token order; slots with id -1 are left out."""
    flat = local_topk_ids.flatten()
    counts = torch.bincount(flat + 1, minlength=num_experts + 1).tolist()
    return SortedSlots(flat.argsort(stable=True)[counts[0] :], counts[1:])


def checked_local_ids(
    topk_ids: torch.Tensor,
    num_local: int,
    expert_map: torch.Tensor | None,
    global_num_experts: int = -1,
) -> torch.Tensor:
    """Local ids int64 [T, K]; ValueError naming an id outside [-1, number of global experts)."""
    limit = num_local if expert_map is None else expert_map.shape[0]
    if global_num_experts >= 0:
        limit = global_num_experts
    if topk_ids.numel():
        low, high = (int(bound) for bound in topk_ids.aminmax())
        if low < -1 or high >= limit:
            raise ValueError(
                f"topk_ids contain {low if low < -1 else high}, which is neither -1 nor one of "
                f"{limit} experts"
            )
    return local_ids(topk_ids, num_local, expert_map)


def _check(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> None:
    if x.dim() != 2 or w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"expected hidden_states [T, H], w1 [e, S * I, H], w2 [e, H, I]; got {tuple(x.shape)}, "
            f"{tuple(w1.shape)}, {tuple(w2.shape)}"
        )
    e, H, width = w2.shape
    wanted = (e, width * (2 if activation.is_gated else 1), H)
    if tuple(w1.shape) != wanted or x.shape[1] != H:
        raise ValueError(
            f"w2 {tuple(w2.shape)} with {activation.value} goes with w1 {wanted} and hidden_states "
            f"[T, {H}]; got {tuple(w1.shape)} and {tuple(x.shape)}"
        )
    if x.dtype not in _DTYPES or not x.dtype == w1.dtype == w2.dtype:
        raise ValueError(
            "hidden_states, w1 and w2 must all be fp32, fp16 or bf16; got "
            f"{x.dtype}, {w1.dtype}, {w2.dtype}"
        )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids must be [{x.shape[0]}, K], got {tuple(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights {tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)} differ"
        )
    for name, bias, shape in (("w1_bias", w1_bias, wanted[:2]), ("w2_bias", w2_bias, (e, H))):
        if bias is not None and tuple(bias.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(bias.shape)}")


_op = torch.library.custom_op("fusedmoe::cpu_experts", _run, mutates_args=(), device_types="cpu")


@_op.register_fake
def _fake(hidden_states: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
