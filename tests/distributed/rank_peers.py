"""Rows between GPUs by peer memory; runs inside a RankPool of GPUs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import rank_models
import torch
import torch.distributed as dist
from rank_layers import SPREADS, Layout, linear, make_groups, token_counts

import fusedmoe
from fusedmoe import FusedMoE, MoEOptions, ParallelGroups
from fusedmoe.distributed.peer_memory import PeerMemory, PeerTimeoutError
from fusedmoe.experts.hopper import HopperExperts
from fusedmoe.experts.hopper_quantized import HopperQuantizedExperts
from fusedmoe.integrations.transformers.accelerate import accelerated_blocks
from fusedmoe.kernels.peer_all_to_all import (
    combine,
    combine_reference,
    dispatch,
    dispatch_reference,
)
from fusedmoe.kernels.peer_layout import PeerLayout
from fusedmoe.prepare_finalize.peer import PeerPrepareAndFinalize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    QuantKey,
)
from fusedmoe.runner.capture import record_graph
from fusedmoe.tuning.hopper_tiles import PrefillTiles
from layer_oracle import Experts
from quantized_layers import Scheme, fill, make_layer

E, K, H, I = 16, 3, 256, 128  # noqa: E741


def layouts(world: int) -> dict[str, Layout]:
    """Every way in which ranks may hold different tokens, over all of them and over pairs, and one
    in which some hold the same."""
    found = {
        "dp": Layout(dp=world, ep=True),
        "sp": Layout(tp=world, ep=True, sp=True),
        "pcp": Layout(pcp=world, ep=True),
        "dp_sp": Layout(dp=world // 2, tp=2, ep=True, sp=True, spanning=True),
    }
    if world > 2:
        found |= {
            "dp_tp": Layout(dp=world // 2, tp=2, ep=True),
            "dp_pairs": Layout(dp=2, ep=True),
            "sp_pairs": Layout(tp=2, ep=True, sp=True),
            "pcp_pairs": Layout(pcp=2, ep=True),
        }
    return found


LAYOUTS = tuple(layouts(4))
KEYS = {
    "as they are": None,
    "fp8 blocks": FP8_DYNAMIC_128,
    "fp8 blocks, powers of two": FP8_DYNAMIC_128_UE8M0,
    "fp8": FP8_DYNAMIC_TOKEN,
    "int8": INT8_DYNAMIC_TOKEN,
}
WEIGHTS = {"fp8 blocks": "fp8_block", "fp8": "fp8_channel", "int8": "int8_channel"}


def memory_for(
    rows: int,
    key: QuantKey | None = None,
    timeout_s: float = 20.0,  # kernels may have to be compiled
    send_sums_from: int | None = None,
    push_rows_from: int | None = None,
    copy_rows_from: int | None = None,
    group: dist.ProcessGroup | None = None,
    **fields,
) -> PeerMemory:
    sizes = {"hidden": H, "topk": K} | fields
    group = group or dist.group.WORLD
    layout = PeerLayout(world=group.size(), rows=rows, dtype=torch.bfloat16, key=key, **sizes)
    return PeerMemory(
        group,
        layout,
        timeout_s=timeout_s,
        send_sums_from=send_sums_from,
        push_rows_from=push_rows_from,
        copy_rows_from=copy_rows_from,
    )


def picks(T: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator).bfloat16()
    ids = torch.randint(-1, E + 1, (T, K), generator=generator)
    return x.cuda(), ids.cuda(), torch.rand(T, K, generator=generator).cuda()


def check_kernels(name: str) -> None:
    """Uneven ranks, several sizes over the same memory, against the references."""
    world, rank, key = dist.get_world_size(), dist.get_rank(), KEYS[name]
    memory = memory_for(300, key)
    owners = (torch.arange(E) * world // E).int().cuda()
    for step, most in enumerate((1, 5, 300, 64)):
        counts = [max(0, most - 2 * r) for r in range(world)]
        everyones = [picks(T, 10 * step + r) for r, T in enumerate(counts)]
        x, ids, weights = everyones[rank]
        dispatch(x, ids, weights, owners, memory.view, most, timeout_us=memory.timeout_us)
        got = memory.view.received(most)
        columns = [list(column) for column in zip(*everyones, strict=True)]
        want = dispatch_reference(*columns, owners, memory.layout, most, rank)
        used = want.topk_ids >= 0
        sent = used.any(dim=1)
        assert torch.equal(got.topk_ids, want.topk_ids)
        assert torch.equal(got.topk_weights[used], want.topk_weights[used])
        found, wanted = (one.hidden_states.float()[sent] for one in (got, want))
        if key is None:
            assert torch.equal(found, wanted)
        else:  # a number between two of the format's may go to either
            torch.testing.assert_close(got.scales[sent], want.scales[sent], rtol=1e-6, atol=0)
            atol = 1.0 if key.dtype is torch.int8 else 2.0**-8
            torch.testing.assert_close(found, wanted, rtol=0.13, atol=atol)
        outputs = [
            torch.randn(
                world * most, H, generator=torch.Generator().manual_seed(100 * step + r)
            ).bfloat16()
            for r in range(world)
        ]
        got.outputs.copy_(outputs[rank])
        out = torch.full_like(x, float("nan"))
        combine(out, ids, owners, memory.view, most, timeout_us=memory.timeout_us)
        on_device = [one.cuda() for one in outputs]
        want = combine_reference(on_device, ids, owners, memory.layout, most, rank)
        assert torch.equal(out, want)
    memory.check()
    memory.close()


def check_layer(tokens: list[int], sent: bool) -> None:
    """A data- and expert-parallel layer gives what one rank with all experts gives, also from a
    graph that is replayed with other tokens. ``sent``: sums go to their tokens' ranks, whatever
    the experts know of that."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens = tokens[:world]
    memory = memory_for(max(tokens), send_sums_from=1 if sent else None)
    groups = ParallelGroups(
        dp=dist.group.WORLD, ep=dist.group.WORLD, enable_expert_parallel=True, peers=memory
    )
    experts = Experts.random(E, H, I)
    layers = []
    for parallel, options in (
        (groups, MoEOptions(prepare_finalize="peer")),
        (None, MoEOptions()),
    ):
        layer = FusedMoE(
            *(E, K, H, I, torch.bfloat16),
            shared_experts=linear(1, width=H).to("cuda", torch.bfloat16),
            parallel=parallel,
            options=options,
            device="cuda",
        )
        layer.load_weights(experts.named())
        layers.append(layer)
    apart, whole = layers
    generator = torch.Generator().manual_seed(7 + rank)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(tokens[rank], H, generator=generator).bfloat16().cuda()
        return x, torch.randn(tokens[rank], E, generator=generator).cuda()

    x, logits = inputs()
    for _ in range(2):
        found = apart(x, logits, tokens_per_rank=tokens)
        assert_near(found, whole(x, logits))
    again = apart(x, logits, tokens_per_rank=tokens)
    assert torch.equal(found, again)
    graph, out = record_graph(lambda: apart(x, logits, tokens_per_rank=tokens), torch.cuda.Stream())
    for _ in range(3):
        other, others = inputs()
        x.copy_(other)
        logits.copy_(others)
        graph.replay()
        assert_near(out, whole(x, logits))
    memory.check()
    memory.close()


def check_model() -> None:
    """A Transformers model: each rank's batch gives what all experts on one rank make of it."""
    spread, plain = (rank_models.model().to("cuda", torch.bfloat16) for _ in range(2))
    config, group = plain.config, dist.group.WORLD
    sizes = {"hidden": config.hidden_size, "topk": config.num_experts_per_tok}
    memory = memory_for(24, **sizes)
    fusedmoe.accelerate(spread, ep_group=group, peers=memory)
    fusedmoe.accelerate(plain, replay_rows=0)
    rank = dist.get_rank()
    ids = rank_models.prompt(rank, 1 + rank % 2, 3 + rank).cuda()
    for block in accelerated_blocks(spread).values():
        assert fusedmoe.explain(block).prepare_finalize is PeerPrepareAndFinalize
    assert_near(spread(ids).logits, plain(ids).logits, 5e-2)
    memory.check()
    memory.close()


def check_layouts(name: str, mover: str = "peer") -> None:
    """Uneven ranks, some without tokens, all tokens on one or to one; twice, for the same bits."""
    layout = layouts(dist.get_world_size()).get(name)
    if layout is None:
        return
    groups, token_rank = make_groups(layout)
    memory = memory_for(
        16, group=groups.ep or (groups.tp if layout.sp else groups.dp or groups.pcp)
    )
    experts = Experts.random(E, H, I)
    made = []
    for arguments in (
        {
            "parallel": replace(groups, peers=memory),
            "is_sequence_parallel": layout.sp,
            "options": MoEOptions(prepare_finalize=mover),
        },
        {},
    ):
        shared = linear(1, width=H).to("cuda", torch.bfloat16)
        layer = FusedMoE(
            *(E, K, H, I, torch.bfloat16), shared_experts=shared, device="cuda", **arguments
        )
        layer.load_weights(experts.named())
        made.append(layer)
    apart, whole = made
    for spread in (*SPREADS, "to_one_rank"):
        kind = "uneven" if spread == "to_one_rank" else spread
        counts = token_counts(kind, layout.token_ranks)
        generator = torch.Generator().manual_seed(token_rank)
        x = torch.randn(counts[token_rank], H, generator=generator).bfloat16().cuda()
        logits = torch.randn(counts[token_rank], E, generator=generator).cuda()
        if spread == "to_one_rank":
            logits[:, :K] += 100
        found = apart(x, logits, tokens_per_rank=counts)
        assert_near(found, whole(x, logits))
        assert torch.equal(found, apart(x, logits, tokens_per_rank=counts))
    memory.check()
    memory.close()


def check_rounded_layer(name: str, tokens: list[int], on_hopper: bool = False) -> None:
    """Rows travel rounded, as the experts take them."""
    key, fmt = KEYS[name], WEIGHTS[name]
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens = tokens[:world]
    memory = memory_for(max(tokens), key, send_sums_from=64)
    groups = ParallelGroups(
        dp=dist.group.WORLD, ep=dist.group.WORLD, enable_expert_parallel=True, peers=memory
    )
    sizes = {"E": E, "K": K, "H": H, "I": I, "dtype": torch.bfloat16, "device": "cuda"}
    whole, w13, w2 = make_layer(fmt, key, options=MoEOptions(), **sizes)
    apart = FusedMoE(
        E,
        K,
        H,
        I,
        torch.bfloat16,
        quant_config=Scheme(fmt, key),
        parallel=groups,
        options=MoEOptions(
            prepare_finalize="peer", experts=HopperQuantizedExperts if on_hopper else None
        ),
        device="cuda",
    )
    mine = slice(rank * E // world, (rank + 1) * E // world)
    fill(apart, w13, w2, mine)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens[rank], H, generator=generator).bfloat16().cuda()
    logits = torch.randn(tokens[rank], E, generator=generator).cuda()
    for _ in range(2):
        found = apart(x, logits, tokens_per_rank=tokens)
        # Where rows have one scale, the kernels of one rank may round what enters w2 by the tile.
        assert_near(found, whole(x, logits), 4e-2 if name == "fp8" else 1e-2)
    memory.check()
    memory.close()


def assert_near(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-2) -> None:
    """Sums over ranks are rounded once more than those of one rank."""
    size = float(wanted.abs().amax()) if wanted.numel() else 0.0
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=share * size)


def check_late_rows(name: str, tokens: list[int]) -> None:
    """Rows that the copy engines bring late, over rubbish, give the bits of rows that were sent;
    also from a graph that is replayed with other tokens."""
    picks, key = 8, KEYS[name]
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens = tokens[:world]
    layers, memories = [], []
    for copy_rows_from in (None, 1):
        memory = memory_for(
            max(tokens), key, send_sums_from=64, copy_rows_from=copy_rows_from, topk=picks
        )
        groups = ParallelGroups(
            dp=dist.group.WORLD, ep=dist.group.WORLD, enable_expert_parallel=True, peers=memory
        )
        way = {"prepare_finalize": "peer"}
        if key is None:
            options = MoEOptions(**way, experts=HopperExperts)
            layer = FusedMoE(
                E, picks, H, I, torch.bfloat16, parallel=groups, options=options, device="cuda"
            )
            layer.load_weights(Experts.random(E, H, I).named())
        else:
            fmt, options = WEIGHTS[name], MoEOptions(**way, experts=HopperQuantizedExperts)
            sizes = {"E": E, "K": picks, "H": H, "I": I, "dtype": torch.bfloat16, "device": "cuda"}
            _, w13, w2 = make_layer(fmt, key, options=MoEOptions(), **sizes)
            layer = FusedMoE(
                *(E, picks, H, I, torch.bfloat16),
                quant_config=Scheme(fmt, key),
                parallel=groups,
                options=options,
                device="cuda",
            )
            fill(layer, w13, w2, slice(rank * E // world, (rank + 1) * E // world))
        layers.append(layer)
        memories.append(memory)
    copied_rows = hold_back_rows(memories[1])
    x = torch.empty(tokens[rank], H, dtype=torch.bfloat16, device="cuda")
    logits = torch.empty(tokens[rank], E, device="cuda")

    def forward(layer: torch.nn.Module) -> torch.Tensor:
        return layer(x, logits, tokens_per_rank=tokens)

    def fill_inputs(step: int) -> None:
        generator = torch.Generator("cuda").manual_seed(10 * step + rank)
        x.normal_(generator=generator)
        logits.normal_(generator=generator)
        if step == 1:  # most tokens go to the experts of one rank
            logits[:, :picks] += 3
        torch.cuda.synchronize()
        dist.barrier()
        for one in memories:
            one.view.own[: one.layout.ids_at].fill_(0xFF)  # NaN
        torch.cuda.synchronize()
        dist.barrier()

    for step in range(3):
        fill_inputs(step)
        sent, copied = (forward(layer) for layer in layers)
        assert torch.isfinite(sent).all()
        assert torch.equal(sent, copied)
        copies = step + 1 if memories[1].copies_rows(max(tokens)) else 0
        assert copied_rows == [max(tokens)] * copies
    graph, out = record_graph(lambda: forward(layers[1]), torch.cuda.Stream())
    for step in range(3):
        fill_inputs(step)
        graph.replay()
        assert torch.equal(out, forward(layers[0]))
    for memory in memories:
        memory.check()
        memory.close()


class PrefillExperts(HopperExperts):
    """Few tokens, too, run the kernels of many."""

    tiles = PrefillTiles()


def check_pushed_rows(
    name: str, tokens: list[int], late: bool = False, mixed: bool = False
) -> None:
    """Rows of picks that products send, over rubbish, give what one rank with all experts gives:
    its very bits where rows are not rounded; also from a graph that is replayed with other tokens.

    ``late``: while the copy engines bring rows; ``mixed``: some ranks can send only sums."""
    picks, key = 8, KEYS[name]
    pushes = key is None or key.group_shape.col == 128  # others run elsewhere, and send sums
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens = tokens[:world]
    memory = memory_for(
        *(max(tokens), key), topk=picks, push_rows_from=1, copy_rows_from=1 if late else None
    )
    groups = ParallelGroups(
        dp=dist.group.WORLD, ep=dist.group.WORLD, enable_expert_parallel=True, peers=memory
    )
    if key is None:
        options = MoEOptions(experts=PrefillExperts)
        over_ranks = {"parallel": groups, "options": replace(options, prepare_finalize="peer")}
        apart, whole = (
            FusedMoE(*(E, picks, H, I, torch.bfloat16), has_bias=True, device="cuda", **arguments)
            for arguments in (over_ranks, {"options": options})
        )
        for layer in (apart, whole):
            layer.load_weights(Experts.random(E, H, I, bias=True).named())
    else:
        fmt, options = WEIGHTS[name], MoEOptions(experts=HopperQuantizedExperts)
        sizes = {"E": E, "K": picks, "H": H, "I": I, "dtype": torch.bfloat16, "device": "cuda"}
        whole, w13, w2 = make_layer(fmt, key, options=options, **sizes)
        apart = FusedMoE(
            *(E, picks, H, I, torch.bfloat16),
            quant_config=Scheme(fmt, key),
            parallel=groups,
            options=replace(options, prepare_finalize="peer"),
            device="cuda",
        )
        fill(apart, w13, w2, slice(rank * E // world, (rank + 1) * E // world))
    if mixed and rank % 2:
        experts: Any = apart.routed_experts.quant_method.kernel(apart.routed_experts).experts
        apply = experts.apply
        experts.apply = lambda output, *others: apply(output[:], *others)  # which knows no ranks
    x = torch.empty(tokens[rank], H, dtype=torch.bfloat16, device="cuda")
    logits = torch.empty(tokens[rank], E, device="cuda")
    layout, own = memory.layout, memory.view.own

    def fill_inputs(step: int) -> None:
        generator = torch.Generator("cuda").manual_seed(10 * step + rank)
        x.normal_(generator=generator)
        logits.normal_(generator=generator)
        if step == 1:  # all tokens go to the experts of one rank or two
            logits[:, :picks] += 100
        torch.cuda.synchronize()
        dist.barrier()
        own[: layout.ids_at].fill_(0xFF)  # NaN
        own[layout.outputs_at : layout.dispatch_flags_at].fill_(0xFF)
        own[layout.kinds_at :].fill_(0xFF)
        torch.cuda.synchronize()
        dist.barrier()

    def forward() -> torch.Tensor:
        return apart(x, logits, tokens_per_rank=tokens)

    def check(found: torch.Tensor) -> None:
        wanted = whole(x, logits)
        # Rounded rows of few tokens, of which one rank has all, are rounded anew by other kernels.
        assert_near(found, wanted, 1e-2 if key is None else 4e-2)
        if key is None and not mixed:
            assert torch.equal(found, wanted)
        kinds = own[layout.kinds_at :][: 4 * world].view(torch.int32).tolist()
        assert kinds == [int(pushes and not (mixed and one % 2)) for one in range(world)]

    for step in range(3):
        fill_inputs(step)
        found = forward()
        check(found)
        fill_inputs(step)
        assert torch.equal(found, forward())
    graph, out = record_graph(forward, torch.cuda.Stream())
    for step in range(3):
        fill_inputs(step)
        graph.replay()
        graph.replay()
        check(out)
    memory.check()
    memory.close()


def hold_back_rows(memory: PeerMemory, cycles: int = 4_000_000) -> list[int]:
    """From now on they leave two milliseconds after everything else; how many, forward by forward,
    is in the list."""
    copy_rows, counts = memory.copy_rows, []

    def later(*arguments: Any) -> None:
        counts.append(arguments[2])
        memory._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(memory._stream):
            torch.cuda._sleep(cycles)
        copy_rows(*arguments)

    memory.copy_rows = later  # type: ignore[method-assign]
    return counts


def check_batched(name: str, tokens: list[int]) -> None:
    """Experts that take each one's rows side by side give what the others do, also from a graph.

    Those on Triton round the rows that come in themselves.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    tokens = tokens[:world]
    memory = memory_for(max(tokens))
    groups = ParallelGroups(
        dp=dist.group.WORLD, ep=dist.group.WORLD, enable_expert_parallel=True, peers=memory
    )
    options = MoEOptions(prepare_finalize="peer_batched")
    apart: dict[str, Any] = {"parallel": groups, "options": options, "device": "cuda"}
    if name in WEIGHTS:
        scheme = Scheme(WEIGHTS[name], KEYS[name])
        sizes = {"E": E, "K": K, "H": H, "I": I, "dtype": torch.bfloat16, "device": "cuda"}
        whole, w13, w2 = make_layer(WEIGHTS[name], KEYS[name], options=MoEOptions(), **sizes)
        layer = FusedMoE(E, K, H, I, torch.bfloat16, quant_config=scheme, **apart)
        fill(layer, w13, w2, slice(rank * E // world, (rank + 1) * E // world))
    else:
        layer, whole = (
            FusedMoE(E, K, H, I, torch.bfloat16, **arguments)
            for arguments in (apart, {"device": "cuda"})
        )
        for one in (layer, whole):
            one.load_weights(Experts.random(E, H, I).named())
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens[rank], H, generator=generator).bfloat16().cuda()
    logits = torch.randn(tokens[rank], E, generator=generator).cuda()
    found = layer(x, logits, tokens_per_rank=tokens)
    assert_near(found, whole(x, logits))
    graph, out = record_graph(lambda: layer(x, logits, tokens_per_rank=tokens), torch.cuda.Stream())
    graph.replay()
    assert torch.equal(out, found)
    memory.check()
    memory.close()


def check_missing_rank(timeout_s: float) -> None:
    """The others learn who is missing within 5 s, also while a graph replays; nothing hangs, nor
    do they wait for that rank where they close the memory and make another."""
    rank = dist.get_rank()
    memory = memory_for(4, timeout_s=timeout_s, group=dist.new_group())
    owners = torch.zeros(E, dtype=torch.int32, device="cuda")
    x, ids, weights = picks(4, 0)
    out = torch.empty_like(x)

    def both() -> None:
        dispatch(x, ids, weights, owners, memory.view, 4, timeout_us=memory.timeout_us)
        combine(out, ids, owners, memory.view, 4, timeout_us=memory.timeout_us)

    both()
    graph, _ = record_graph(both, torch.cuda.Stream())
    torch.cuda.synchronize()
    dist.barrier()
    if rank != 1:
        start = time.monotonic()
        caught = None
        try:
            graph.replay()
            torch.cuda.synchronize()
            while time.monotonic() < start + 9:
                time.sleep(0.01)
        except PeerTimeoutError as error:
            caught = error
        assert caught is not None
        assert "rank 1 of" in str(caught)
        took = time.monotonic() - start
        assert timeout_s / 2 < took < 5, f"told after {took:.2f} s"
        start = time.monotonic()
        memory.close()
        took = time.monotonic() - start
        assert took < timeout_s + 1, f"closed after {took:.2f} s"
    dist.barrier()
    memory.close()
    memory_for(4).close()


def check_disagreement() -> None:
    with pytest.raises(ValueError, match="rows is 4, 5"):
        memory_for(4 + dist.get_rank())


def check_no_growth() -> None:
    """What is kept after the first rounds is kept once, not once per round."""

    def free_after(rounds: int) -> int:
        for _ in range(rounds):
            memory_for(64, hidden=1024).close()
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    before, after = free_after(10), free_after(100)
    assert before - after <= 8 << 20, f"{(before - after) >> 20} MiB in 100 rounds"
