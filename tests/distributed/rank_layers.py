"""Layers over several ranks, compared with the one-rank layer; runs inside a RankPool."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fusedmoe import FusedMoE, MoEOptions, ParallelGroups
from layer_oracle import Experts

E, K, H, I = 6, 3, 8, 14  # noqa: E741


@dataclass(frozen=True)
class Layout:
    """How many ranks along each dimension; ``sp``: the tp ranks hold different tokens."""

    dp: int = 1
    pcp: int = 1
    tp: int = 1
    ep: bool = False
    sp: bool = False
    spanning: bool = False  # whether the ep group itself is given, beside the others

    @property
    def size(self) -> int:
        return self.dp * self.pcp * self.tp

    @property
    def token_ranks(self) -> int:
        return self.size if self.sp else self.dp * self.pcp

    def __str__(self) -> str:
        sizes = [f"{n}{getattr(self, n)}" for n in ("dp", "pcp", "tp") if getattr(self, n) > 1]
        flags = [name for name in ("ep", "sp", "spanning") if getattr(self, name)]
        return "-".join(sizes + flags)


@functools.cache
def make_groups(layout: Layout) -> tuple[ParallelGroups, int]:
    """The groups of this process, and its rank among the token ranks of its replica."""
    world, me = dist.get_world_size(), dist.get_rank()
    found: dict[str, Any] = {}
    for replica in range(world // layout.size):
        first = replica * layout.size
        grid = torch.arange(first, first + layout.size).view(layout.dp, layout.pcp, layout.tp)
        for axis, name in enumerate(("dp", "pcp", "tp")):
            if grid.shape[axis] == 1:
                continue
            for members in grid.movedim(axis, -1).reshape(-1, grid.shape[axis]).tolist():
                group = dist.new_group(members)
                if me in members:
                    found[name] = group
        if layout.spanning:
            members = grid.flatten().tolist()
            group = dist.new_group(members)
            if me in members:
                found["ep"] = group
    flat = me % layout.size
    token_rank = flat if layout.sp else flat // layout.tp
    return ParallelGroups(enable_expert_parallel=layout.ep, **found), token_rank


def token_counts(spread: str, ranks: int) -> list[int]:
    return {
        "even": [4] * ranks,
        "uneven": [1 + 3 * rank % 7 for rank in range(ranks)],
        "one_empty": [0 if rank == ranks - 1 else 3 for rank in range(ranks)],
        "all_on_one": [9 if rank == 0 else 0 for rank in range(ranks)],
        "none": [0] * ranks,
    }[spread]


SPREADS = ("even", "uneven", "one_empty", "all_on_one", "none")


def rows(
    T: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    columns: int = E,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator).to(dtype)
    return x.to(device), torch.randn(T, columns, generator=generator).to(device)


def linear(seed: int, bias: bool = True, width: int = H) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(width, width, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return made


def build(dtype: torch.dtype = torch.float32, device: str = "cpu", **arguments: Any) -> nn.Module:
    options = arguments.pop("options", MoEOptions())
    top_k, zero = arguments.pop("top_k", K), arguments.pop("zero_experts", 0)
    if zero:
        arguments["e_score_correction_bias"] = torch.linspace(0, 0.3, E + zero)
    layer = FusedMoE(E, top_k, H, I, dtype, options=options, device=device, **arguments)
    shared = arguments.get("n_shared_experts") or 0
    experts = Experts.random(E + shared, H, I, bias=bool(arguments.get("has_bias")))
    layer.load_weights(experts.named())
    layer.routed_experts.check_loaded()
    return layer


def check_layout(
    layout: Layout,
    mover: str,
    spreads: Sequence[str] = SPREADS,
    given: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    experts: str | None = None,
    captured: bool = False,
    to_one_rank: bool = False,
    **arguments: Any,
) -> None:
    """Equal to the one-rank layer on this rank's tokens, and bit-equal run to run.

    Everything is built with biases and replicated shared experts, which must be added once.
    ``to_one_rank``: every token wants the first expert (``top_k`` 1) alone.
    """
    groups, token_rank = make_groups(layout)
    common: dict[str, Any] = {"has_bias": True} | arguments
    if common.pop("shared", True):
        common["shared_experts"] = linear(1).to(device, dtype)
    alone = build(dtype, device, **common)
    options = MoEOptions(prepare_finalize=mover or None, experts=experts)
    layer = build(
        dtype,
        device,
        parallel=groups,
        is_sequence_parallel=layout.sp,
        options=options,
        **common,
    )
    for spread in spreads:
        counts = token_counts(spread, layout.token_ranks)
        columns = E + common.get("zero_experts", 0)
        x, logits = rows(counts[token_rank], 10 + token_rank, dtype, device, columns)
        if to_one_rank:
            logits[:, 0] += 100
        known = {"tokens_per_rank": counts} if given else {}
        found = layer(x, logits, **known)
        again = layer(x, logits, **known)
        expected = alone(x, logits)
        what = f"{layout} {mover} {spread}"
        assert found.isfinite().all(), what
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, w=what: f"{w}: {m}"
        )
        assert torch.equal(found, again), what
        if captured:
            check_replay(layer, x, logits, counts, found)


def check_replay(
    layer: nn.Module,
    x: torch.Tensor,
    logits: torch.Tensor,
    counts: list[int],
    expected: torch.Tensor,
) -> None:
    """A CUDA graph of the forward gives the same bits, replayed on other tokens and on these."""
    from fusedmoe.runner.capture import record_graph

    static, static_logits = x.clone(), logits.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph, output = record_graph(
        lambda: layer(static, static_logits, tokens_per_rank=counts), stream
    )
    torch.cuda.synchronize()
    for values in (torch.zeros_like(x), x):
        static.copy_(values)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)


def run_with(layout: Layout, arguments: dict[str, Any]) -> None:
    named = {"mover": "", "spreads": ("even", "uneven", "one_empty")} | arguments
    check_layout(layout, **named)


def check_fewer_experts(layout: Layout, mover: str) -> None:
    """Ranks without an expert send their tokens away, and have nothing to give to others."""
    groups, token_rank = make_groups(layout)
    options = MoEOptions(prepare_finalize=mover or None)
    alone, layer = (
        FusedMoE(3, 2, H, I, torch.float32, **arguments)
        for arguments in ({}, {"parallel": groups, "options": options})
    )
    for one in (alone, layer):
        one.load_weights(Experts.random(3, H, I).named())
    x, logits = rows(2 + token_rank, token_rank, columns=3)
    torch.testing.assert_close(layer(x, logits), alone(x, logits), rtol=1e-5, atol=1e-5)
    here = int(groups.size_and_rank(groups.dp or groups.tp)[1] < 3)
    assert all(row.shape[0] == here for row in layer.routed_experts.get_expert_weights())


def check_companions(layout: Layout, mover: str) -> None:
    """Padding, token ids, a gate, transforms: what is beside a rank's tokens stays with them."""
    groups, token_rank = make_groups(layout)
    T = 4 + token_rank
    x, logits = rows(T, token_rank)
    place = torch.arange(T)
    table = torch.stack([(torch.arange(K) + i) % E for i in range(20)]).int()
    gate = nn.Linear(H, E, bias=False)
    with torch.no_grad():
        gate.weight.copy_(rows(E, 3)[0])
    around = {
        "gate": gate,
        "routed_input_transform": linear(2, bias=False),
        "routed_output_transform": linear(3),
    }
    calls: tuple[tuple[dict[str, Any], tuple[torch.Tensor, ...], dict[str, Any]], ...] = (
        ({"skip_padding": True}, (x, logits), {"is_padding": place % 2 == token_rank % 2}),
        ({"hash_indices_table": table, "scoring_func": "sqrtsoftplus"}, (x, logits, place), {}),
        (around, (x,), {}),
    )
    for arguments, given, named in calls:
        arguments = {"shared_experts": linear(1)} | arguments
        spread = build(
            parallel=groups,
            is_sequence_parallel=layout.sp,
            options=MoEOptions(prepare_finalize=mover or None),
            **arguments,
        )
        found, expected = spread(*given, **named), build(**arguments)(*given, **named)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_batch_invariance(layout: Layout) -> None:
    """A rank's tokens have the same bits whatever else it and the others bring."""
    groups, token_rank = make_groups(layout)
    layer = build(
        torch.bfloat16, parallel=groups, options=MoEOptions(batch_invariant=True), top_k=E
    )
    x, logits = rows(40, 10 + token_rank, torch.bfloat16)
    whole = layer(x, logits)
    for T in (1, 7, 33):
        T = T if layout.token_ranks == 1 else T - token_rank % 2
        assert torch.equal(layer(x[:T], logits[:T]), whole[:T]), T


def check_compiled(layout: Layout) -> None:
    """``torch.compile(fullgraph=True)`` traces dispatch and combine as it finds them.

    Compiled code runs as a whole what eager code runs in halves.
    """
    groups, token_rank = make_groups(layout)
    layer = build(
        parallel=groups,
        is_sequence_parallel=layout.sp,
        options=MoEOptions(experts="torch", micro_batch_tokens=2),
        shared_experts=linear(1),
    )
    counts = token_counts("uneven", layout.token_ranks)
    known = {"tokens_per_rank": counts} if layout.token_ranks > 1 else {}
    x, logits = rows(counts[token_rank], 10 + token_rank)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits, **known), layer(x, logits, **known))


def check_one_operator(layout: Layout) -> None:
    """Ranks that share their tokens run router and experts as one operator, and add up outside."""
    groups, token_rank = make_groups(layout)
    layer = build(parallel=groups, shared_experts=linear(1))
    x, logits = rows(5, 10 + token_rank)
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x, logits), layer(x, logits))
    assert sum("fusedmoe.routed_experts" in target for target in targets) == 1
