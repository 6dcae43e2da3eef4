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

# fp32 temporaries of the activation stay in L2, and small enough for malloc to keep their pages.
_ACTIVATION_ELEMENTS = 1 << 17

Linear = Callable[[torch.Tensor, int, torch.Tensor], object]
"""Rows [M, in], a local expert and where to write [M, out]."""


class Products(NamedTuple):
    """Both products of every expert."""

    up: Linear
    down: Linear

    @classmethod
    def plain(cls, w1: torch.Tensor, w2: torch.Tensor) -> Products:
        return cls(
            lambda rows, expert, out: expert_linear(rows, w1[expert], out),
            lambda rows, expert, out: expert_linear(rows, w2[expert], out),
        )


class Layer(NamedTuple):
    """What the experts compute. ``width`` is S * I; biases are [e, S * I] and [e, H]."""

    products: Products
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


def scratch_rows(T: int, K: int, H: int, max_bytes: int | None = None) -> int:
    """Rows of scratch for T tokens: all of their slots, within SCRATCH_BYTES and ``max_bytes``.

    At least the K rows of one token.
    """
    limit = SCRATCH_BYTES if max_bytes is None else min(SCRATCH_BYTES, max_bytes)
    return max(K, min(T * K, limit // (4 * H)))


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
    up = _per_expert(rows, block, layer.products.up, layer.up_bias, buffers.up[:count])
    middle = buffers.middle[:count]
    step = max(1, _ACTIVATION_ELEMENTS // up.shape[1])
    for start in range(0, count, step):
        part = slice(start, start + step)
        middle[part] = activation_reference(layer.activation, up[part], layer.config)
    out = result if result.dtype is rows.dtype else buffers.down[:count]
    down = _per_expert(middle, block, layer.products.down, layer.down_bias, out)
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
