"""How the routed experts of one layer run on a CPU.

Slots (t, k) are sorted by expert once (``cpu_plan.py``). The rows of a few consecutive experts make
a block: gathered, multiplied expert by expert, activated together, multiplied again, written to
fp32 scratch in sorted order. At the end every token gathers its K rows from there and sums them in
the order of its picks. Weights are read once for as many tokens as scratch holds.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K routed rows, S = 2 where the
activation is gated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.experts.cpu_plan import Block, Route, blocks_of, sort_slots
from fusedmoe.forward_only import forward_only
from fusedmoe.modular_kernel import ProblemSize, WorkspaceShapes

SCRATCH_BYTES = 256 << 20

# Blocks that are read again at once: small enough for L2, and for malloc to keep their pages.
_BLOCK_ELEMENTS = 1 << 19
_ACTIVATION_ELEMENTS = 1 << 17


class Rows(Protocol):
    """The rows of a product: a tensor [M, width], or what ``encode_*`` made of one."""

    def split(self, counts: Any, /) -> Sequence[Any]: ...


def sizes_in_parts(counts: int | Sequence[int], parts: int) -> int | list[int]:
    """What to split rows by that are stored as ``parts`` rows each."""
    return counts * parts if isinstance(counts, int) else [count * parts for count in counts]


class Products(NamedTuple):
    """What multiplies rows by an expert's weight; ``up`` and ``down`` hold e weights each.

    A weight is whatever ``linear`` takes as one: usually [S * I, H] and [H, I]. ``encode_up`` and
    ``encode_down`` make of many rows at once what ``linear`` takes as rows, if not the tensor.
    ``linears``, where there is one, takes rows and n weights: a row for each, or one for all.
    """

    linear: Callable[[Any, Any, torch.Tensor], None]
    up: Sequence[Any] | torch.Tensor
    down: Sequence[Any] | torch.Tensor
    encode_up: Callable[[torch.Tensor], Rows] | None = None
    encode_down: Callable[[torch.Tensor], Rows] | None = None
    linears: Callable[[Any, Sequence[Any]], torch.Tensor] | None = None

    def entering(self, rows: torch.Tensor) -> Rows:
        return rows if self.encode_up is None else self.encode_up(rows)

    def between(self, rows: torch.Tensor) -> Rows:
        return rows if self.encode_down is None else self.encode_down(rows)


class Layer(NamedTuple):
    """What the experts compute. ``up_width`` is S * I; biases are [e, S * I] and [e, H]."""

    products: Products
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: MoEActivation
    config: ApplyMoEActivationConfig
    up_width: int


class Buffers(NamedTuple):
    """Memory for one block, reused by all: [rows, H], [rows, S * I], [rows, I], [rows, H]."""

    rows: torch.Tensor
    up: torch.Tensor
    middle: torch.Tensor
    down: torch.Tensor

    @classmethod
    def like(cls, x: torch.Tensor, rows: int, layer: Layer) -> Buffers:
        width = layer.up_width // 2 if layer.activation.is_gated else layer.up_width
        sizes = (x.shape[1], layer.up_width, width, x.shape[1])
        return cls(*(x.new_empty(rows, size) for size in sizes))


@forward_only
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
    if T == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if T == 1:
        return _run_one_token(layer, route, x, topk_weights, topk_ids)
    if batch_invariant:
        tokens = (t.split(1) for t in (x, topk_weights, topk_ids))
        return torch.cat([_run_one_token(layer, route, *one) for one in zip(*tokens, strict=True)])
    if scratch is None:
        scratch = x.new_empty(scratch_rows(T, K, x.shape[1]), x.shape[1], dtype=torch.float32)
    step = max(1, scratch.shape[0] // max(1, K))
    if step >= T:
        return _run_tokens(layer, route, x, topk_weights, topk_ids, scratch)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, T, step):
        part = slice(start, start + step)
        output[part] = _run_tokens(
            layer, route, x[part], topk_weights[part], topk_ids[part], scratch
        )
    return output


def scratch_rows(T: int, K: int, H: int, max_bytes: int | None = None) -> int:
    """Rows of scratch for T tokens: all of their slots, within SCRATCH_BYTES and ``max_bytes``.

    At least the K rows of one token.
    """
    limit = SCRATCH_BYTES if max_bytes is None else min(SCRATCH_BYTES, max_bytes)
    return max(K, min(T * K, limit // (4 * H)))


def cpu_shapes(size: ProblemSize, dtype: torch.dtype) -> WorkspaceShapes:
    """The first workspace, of ``dtype``, holds scratch in fp32."""
    rows, per_float = scratch_rows(size.M, size.topk, size.K), 4 // dtype.itemsize
    return WorkspaceShapes((rows, size.K * per_float), (0,), (size.M, size.K))


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
    tokens = torch.tensor(order.tokens, device=x.device)
    blocks = list(blocks_of(order.counts, max(1, _BLOCK_ELEMENTS // layer.up_width)))
    buffers = Buffers.like(x, max(block.stop - block.start for block in blocks), layer)
    for block in blocks:
        mine = tokens[block.start : block.stop]
        rows = torch.index_select(x, 0, mine, out=buffers.rows[: mine.numel()])
        _run_block(layer, rows, block, buffers, scratch[block.start : block.stop])
    weights = topk_weights.flatten()
    if len(order.slots) < weights.numel():
        weights = weights[torch.tensor(order.slots, device=x.device)]
    total = F.embedding_bag(
        torch.tensor(order.rows, device=x.device),
        scratch,
        torch.tensor(order.offsets, device=x.device),
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
) -> torch.Tensor:
    """As ``_run_tokens``; one token needs no sorting, and its sum is one small product."""
    experts = [route.local(expert) for expert in topk_ids[0].tolist()]
    weights = topk_weights
    if min(experts, default=-1) < 0:
        weights = weights[:, [k for k, expert in enumerate(experts) if expert >= 0]]
        experts = [expert for expert in experts if expert >= 0]
    if not experts:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    products = layer.products
    # A copy, aligned whatever rows came with it: the results of a BLAS may depend on the address.
    x = x.clone(memory_format=torch.contiguous_format)
    up = _one_row_each(products, products.entering(x), products.up, experts, layer.up_width, x)
    up = _biased(up, layer.up_bias, experts)
    middle = activation_reference(layer.activation, up, layer.config).to(x.dtype)
    rows = products.between(middle)
    down = _one_row_each(products, rows, products.down, experts, x.shape[1], middle)
    return torch.mm(weights, _biased(down, layer.down_bias, experts).float()).to(x.dtype)


def _one_row_each(
    products: Products,
    rows: Any,
    weights: Sequence[Any] | torch.Tensor,
    experts: list[int],
    width: int,
    like: torch.Tensor,
) -> torch.Tensor:
    """[n, width]: each expert's weight times its row, or times the only row, of those that are
    ``like`` [n or 1, ...] before they are encoded."""
    mine = [weights[expert] for expert in experts]
    if products.linears is not None:
        return products.linears(rows, mine)
    out = like.new_empty(len(mine), width)
    return one_by_one(products.linear, rows, like.shape[0], mine, out)


def one_by_one(
    linear: Callable[[Any, Any, torch.Tensor], None],
    rows: Any,
    num_rows: int,
    weights: Sequence[Any],
    out: torch.Tensor,
) -> torch.Tensor:
    """``out`` [n, N], filled: each of n weights times its row, or times the only row."""
    pieces = rows.split(1) if num_rows == len(weights) else [rows] * len(weights)
    for row, weight, target in zip(pieces, weights, out.split(1), strict=True):
        linear(row, weight, target)
    return out


def _run_block(
    layer: Layer, rows: torch.Tensor, block: Block, buffers: Buffers, result: torch.Tensor
) -> None:
    """Write the unweighted expert outputs of a block's rows into ``result``, fp32 [rows, H]."""
    count = rows.shape[0]
    products, entering = layer.products, layer.products.entering(rows)
    up = _per_expert(
        entering, block, products.linear, products.up, layer.up_bias, buffers.up[:count]
    )
    middle = buffers.middle[:count]
    step = max(1, _ACTIVATION_ELEMENTS // up.shape[1])
    for start in range(0, count, step):
        part = slice(start, start + step)
        middle[part] = activation_reference(layer.activation, up[part], layer.config)
    out = result if result.dtype is rows.dtype else buffers.down[:count]
    down = _per_expert(
        products.between(middle), block, products.linear, products.down, layer.down_bias, out
    )
    if down is not result:
        result.copy_(down)


def _per_expert(
    rows: Rows,
    block: Block,
    linear: Callable[[Any, Any, torch.Tensor], None],
    weights: Sequence[Any] | torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Every expert's rows through its own product, in order, into ``out``.

    With a bias the result is another tensor, in fp32.
    """
    counts = [count for _, count in block.experts]
    for (expert, _), mine, target in zip(
        block.experts, rows.split(counts), out.split(counts), strict=True
    ):
        linear(mine, weights[expert], target)
    return _biased(out, bias, [expert for expert, count in block.experts for _ in range(count)])


def _biased(rows: torch.Tensor, bias: torch.Tensor | None, experts: list[int]) -> torch.Tensor:
    """rows + bias of each row's expert, in fp32; the rows themselves where there is no bias."""
    if bias is None:
        return rows
    return rows.float() + bias[torch.tensor(experts, device=bias.device)].float()
