"""The routed experts of one layer on a CPU, as one function of tensors.

Slots (t, k) are sorted by expert once (``cpu_plan.py``). The rows of a few consecutive experts make
a block: gathered, multiplied expert by expert, activated together, multiplied again, written to
fp32 scratch in sorted order. At the end every token gathers its K rows from there and sums them in
the order of its picks. Weights are read once for as many tokens as scratch holds.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K routed rows, S = 2 where the
activation is gated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.experts.cpu_gemm import expert_linear
from fusedmoe.experts.cpu_plan import Block, ExpertRows, Route, blocks_of, sort_slots

SCRATCH_BYTES = 256 << 20
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# fp32 temporaries of the activation stay in L2, and small enough for malloc to keep their pages.
_ACTIVATION_ELEMENTS = 1 << 17

Linear = Callable[[torch.Tensor, int, torch.Tensor], object]
"""Rows [M, in], a local expert and where to write [M, out]."""


class Layer(NamedTuple):
    """What the experts compute. ``width`` is S * I; biases are [e, S * I] and [e, H]."""

    up: Linear
    down: Linear
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: MoEActivation
    config: ApplyMoEActivationConfig
    width: int


class Buffers(NamedTuple):
    """Scratch for the rows of one block, reused by all: [rows, S * I], [rows, I], [rows, H]."""

    up: torch.Tensor
    middle: torch.Tensor
    down: torch.Tensor

    @classmethod
    def like(cls, x: torch.Tensor, rows: int, layer: Layer) -> Buffers:
        width = layer.width // 2 if layer.activation.is_gated else layer.width
        sizes = (layer.width, width, x.shape[1])
        return cls(*(x.new_empty(rows, size) for size in sizes))


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
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden_states [T, H], w1 [e, S * I, H], w2 [e, H, I] -> [T, H]; no gradient flows.

    fp32, fp16 or bf16, all three alike; weights may have any strides. topk_weights fp32 [T, K],
    topk_ids int [T, K] in [-1, global_num_experts), -1 being no expert; global_num_experts -1 means
    the length of ``expert_map`` (int32, global -> local id or -1), else e.
    ``apply_router_weight_on_input`` (K = 1) weights the rows that enter. ``batch_invariant``
    computes every token alone, which makes its bits independent of the others, and T > 1 slow.
    ``scratch`` fp32 [rows, H], rows >= K, bounds the memory used; None allocates up to 256 MiB.

    Raises ValueError for shapes or dtypes that disagree and for ids out of range.
    """
    _check(hidden_states, w1, w2, topk_weights, topk_ids, activation, w1_bias, w2_bias)
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(
            f"apply_router_weight_on_input needs top-1 routing, got K = {topk_ids.shape[1]}"
        )
    numbers = activation_config or ApplyMoEActivationConfig()
    arguments = (
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
    if torch.compiler.is_compiling():
        return _op(*arguments)
    return _run(*arguments, scratch)


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
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    x, weights = hidden_states, topk_weights.float()
    if apply_router_weight_on_input:
        x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
    layer = Layer(
        lambda rows, expert, out: expert_linear(rows, w1[expert], out),
        lambda rows, expert, out: expert_linear(rows, w2[expert], out),
        w1_bias,
        w2_bias,
        MoEActivation(activation),
        ApplyMoEActivationConfig(
            clamp_limit=clamp_limit,
            alpha=alpha,
            beta=beta,
            situ_beta=situ_beta,
            situ_linear_beta=situ_linear_beta,
        ),
        w1.shape[1],
    )
    route = Route.make(w1.shape[0], expert_map, global_num_experts)
    return run_layer(layer, route, x, weights, topk_ids, batch_invariant, scratch)


def run_layer(
    layer: Layer,
    route: Route,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    batch_invariant: bool = False,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, H], weights fp32 [T, K], ids int [T, K] -> [T, H] like x, some tokens at a time.

    ``scratch`` fp32 [rows, H], rows >= K, is allocated where it is None.
    """
    T, K = topk_ids.shape
    if scratch is None:
        scratch = torch.empty(scratch_rows(T, K, x.shape[1]), x.shape[1])
    step = 1 if batch_invariant else max(1, scratch.shape[0] // max(1, K))
    if T == 1:
        return _run_one_token(layer, route, x, topk_weights, topk_ids, scratch)
    if step >= T:
        return _run_tokens(layer, route, x, topk_weights, topk_ids, scratch)
    run = _run_one_token if step == 1 else _run_tokens
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, T, step):
        part = slice(start, start + step)
        output[part] = run(layer, route, x[part], topk_weights[part], topk_ids[part], scratch)
    return output


def scratch_rows(T: int, K: int, H: int) -> int:
    """Rows of scratch for T tokens: all of their slots, within SCRATCH_BYTES."""
    return max(K, min(T * K, SCRATCH_BYTES // (4 * H)))


def _run_tokens(
    layer: Layer,
    route: Route,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    scratch: torch.Tensor,
) -> torch.Tensor:
    order = sort_slots(topk_ids.tolist(), route)
    if not order.rows:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    tokens = torch.tensor(order.tokens)
    blocks = list(blocks_of(order.counts))
    buffers = Buffers.like(x, max(block.stop - block.start for block in blocks), layer)
    for block in blocks:
        rows = x.index_select(0, tokens[block.start : block.stop])
        _run_block(layer, rows, block, buffers, scratch[block.start : block.stop])
    weights = topk_weights.flatten()
    if len(order.slots) < weights.numel():
        weights = weights[torch.tensor(order.slots)]
    total = F.embedding_bag(
        torch.tensor(order.rows),
        scratch,
        torch.tensor(order.offsets),
        mode="sum",
        per_sample_weights=weights,
    )
    return total.to(x.dtype)


def _run_one_token(
    layer: Layer,
    route: Route,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """As ``_run_tokens``; one token needs no sorting, and its sum is one small product."""
    experts = [route.local(expert) for expert in topk_ids[0].tolist()]
    here = [k for k, expert in enumerate(experts) if expert >= 0]
    if not here:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    block = Block(0, len(here), [ExpertRows(experts[k], 1) for k in here])
    down = scratch[: len(here)]
    _run_block(layer, x.expand(len(here), -1), block, Buffers.like(x, len(here), layer), down)
    weights = topk_weights if len(here) == len(experts) else topk_weights[:, here]
    return torch.mm(weights, down).to(x.dtype)


def _run_block(
    layer: Layer, rows: torch.Tensor, block: Block, buffers: Buffers, result: torch.Tensor
) -> None:
    """Write the unweighted expert outputs of a block's rows into ``result``, fp32 [rows, H]."""
    count = rows.shape[0]
    up = _per_expert(rows, block, layer.up, layer.up_bias, buffers.up[:count])
    middle = buffers.middle[:count]
    step = max(1, _ACTIVATION_ELEMENTS // up.shape[1])
    for start in range(0, count, step):
        part = slice(start, start + step)
        middle[part] = activation_reference(layer.activation, up[part], layer.config)
    out = result if result.dtype is rows.dtype else buffers.down[:count]
    down = _per_expert(middle, block, layer.down, layer.down_bias, out)
    if down is not result:
        result.copy_(down)


def _per_expert(
    rows: torch.Tensor,
    block: Block,
    linear: Linear,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Every expert's rows through its own product, in order, into ``out``.

    With a bias the result is another tensor, in fp32.
    """
    start = 0
    for expert, count in block.experts:
        linear(rows[start : start + count], expert, out[start : start + count])
        start += count
    if bias is None:
        return out
    experts = torch.tensor([expert for expert, count in block.experts for _ in range(count)])
    return out.float() + bias[experts].float()


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


_op = torch.library.custom_op(
    "fusedmoe::cpu_experts", _run, mutates_args=("scratch",), device_types="cpu"
)


@_op.register_fake
def _fake(hidden_states: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
