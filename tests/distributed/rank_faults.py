"""What must fail, and how, over several ranks; runs inside a RankPool."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_layers import E, H, I, K, Layout, build, linear, make_groups, rows
from rank_micro_batches import kernel_of

from fusedmoe import FusedMoE, MoEOptions, OnlineQuantization, ParallelGroups
from fusedmoe.distributed.agreement import RanksDisagreeError
from fusedmoe.distributed.collectives import (
    all_gather_rows,
    exchange_rows,
    pack_rows,
    reduce_scatter_rows,
    sum_in_order,
    unpack_rows,
)
from fusedmoe.distributed.groups import TokenRanks
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.kernels.peer_layout import PeerLayout


def check_disagreement() -> None:
    """Each of these differs on one rank of four; every rank says so, and the next layer works."""
    groups, _ = make_groups(Layout(dp=2, tp=2, ep=True))
    odd = dist.get_rank() == 2
    common = {"parallel": groups, "params_dtype": torch.float32}
    format_of_rank = "int8_channel" if odd else "fp8_channel"
    peers: Any = object() if odd else None
    whole = make_groups(Layout(dp=2, tp=2, ep=True, spanning=True))[0].ep
    spanning = whole if odd else None
    shared, transform = linear(1), linear(2, bias=odd)
    dtypes = "in_dtype is torch.float32, torch.float32, torch.bfloat16, torch.float32"
    scale = {"apply_routed_scale_to_output": True}
    for message, changed in (
        ("num_experts is 6, 6, 8, 6", {"num_experts": E + 2 * odd}),
        ("hidden_dim is 8, 8, 16, 8", {"hidden_size": H * (1 + odd)}),
        ("intermediate_size is", {"intermediate_size": I + odd}),
        (dtypes, {"params_dtype": torch.bfloat16 if odd else torch.float32}),
        ("experts_per_token is 3, 3, 2, 3", {"top_k": K - odd}),
        ("renormalize=False", {"renormalize": not odd}),
        ("batch_invariant is", {"options": MoEOptions(batch_invariant=odd)}),
        ("experts is , , torch, ", {"options": MoEOptions(experts="torch" if odd else None)}),
        ("debug_checks is False, False, True, False", {"options": MoEOptions(debug_checks=odd)}),
        ("weights and rows is", {"quant_config": OnlineQuantization.of(format_of_rank)}),
        ("enable_eplb is", {"enable_eplb": odd}),
        ("peers is False, False, True", {"parallel": replace(groups, peers=peers)}),
        ("placement is", {"expert_placement": "round_robin" if odd else "linear"}),
        (
            "ep group is False, False, True",
            {"parallel": replace(groups, ep=spanning if odd else None)},
        ),
        ("prefix is layers.1, layers.1, layers.2", {"prefix": f"layers.{1 + odd}"}),
        ("shared_experts is", {"shared_experts": shared if odd else None}),
        ("experts_sharded is", {"shared_experts": shared, "shared_experts_sharded": odd}),
        ("input_transform is", {"routed_input_transform": shared if odd else None}),
        ("output_transform is", {"routed_output_transform": shared if odd else None}),
        ("before the sum is True, True, False", {"routed_output_transform": transform}),
        ("scaling_factor is 2.5, 2.5, 2.0", scale | {"routed_scaling_factor": 2.5 - odd / 2}),
        ("reduce_results is", {"reduce_results": odd}),
        ("gate is False, False, True", {"gate": linear(1, width=H) if odd else None}),
        (
            "shared_expert_gate is",
            {"shared_experts": shared, "shared_expert_gate": shared if odd else None},
        ),
    ):
        sizes = {"num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I}
        with pytest.raises(ValueError, match=message):
            FusedMoE(**(sizes | common | changed))
    FusedMoE(E, K, H, I, **common)


def failing_runner(*_: Any, **__: Any) -> Any:
    raise MemoryError("no room")


def check_failures() -> None:
    """One rank cannot build its layer, before or after the ranks have compared theirs."""
    groups, _ = make_groups(Layout(dp=2, tp=2, ep=True))
    odd = dist.get_rank() == 2
    ep_of_rank_2 = replace(
        make_groups(Layout(dp=2, tp=2, ep=True, spanning=True))[0], enable_expert_parallel=not odd
    )
    for own, told, changed in (
        (ValueError, "ValueError: .*top_k", {"top_k": 99 if odd else K}),
        (ValueError, "ValueError: the ep group has size 4", {"parallel": ep_of_rank_2}),
        (MemoryError, "MemoryError: no room", {"runner_cls": failing_runner if odd else None}),
    ):
        arguments: dict[str, Any] = {"top_k": K, "parallel": groups} | changed
        told = rf"what went wrong is nothing, nothing, {told}.*, nothing$"
        expected = (own, None) if odd else (RanksDisagreeError, told)
        with pytest.raises(expected[0], match=expected[1]):
            FusedMoE(num_experts=E, hidden_size=H, intermediate_size=I, **arguments)
    FusedMoE(E, K, H, I, parallel=groups)


def check_overlapping_groups() -> None:
    """The same ranks along two dimensions: all but four of sixteen experts would be nowhere."""
    whole = dist.group.WORLD
    for flag in (True, False):
        groups = ParallelGroups(dp=whole, tp=whole, enable_expert_parallel=flag)
        with pytest.raises(ValueError, match=r"sizes \[4, 4\], .* only \[0, 5, 10, 15\] are there"):
            FusedMoE(16, K, H, 16, torch.float32, parallel=groups)


def check_peers_of_two_hosts() -> None:
    """Memory that GPUs share ends at a host, which is said before any of it is asked for."""
    host = "one" if dist.get_rank() < 2 else "two"
    with (
        mock.patch("socket.gethostname", return_value=host),
        pytest.raises(ValueError, match=r"peer memory .* host is one, one, two, two"),
    ):
        PeerMemory(dist.group.WORLD, PeerLayout(4, 8, 64, 2, torch.bfloat16))


def check_memory_of_one_rank() -> None:
    """A rank that cannot make its buffer: one has another size in mind, one has no room."""
    odd = dist.get_rank() == 1
    own = "layout is for 2 ranks, the group has 4"
    with pytest.raises(ValueError, match=own if odd else f"nothing, ValueError: the {own}"):
        PeerMemory(dist.group.WORLD, PeerLayout(2 if odd else 4, 8, 64, 2, torch.bfloat16))
    no_room = MemoryError("no room") if odd else None
    with (
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.distributed._symmetric_memory.empty", side_effect=no_room),
        pytest.raises(
            MemoryError if odd else RanksDisagreeError,
            match="no room" if odd else "nothing, MemoryError: no room, nothing, nothing",
        ),
    ):
        PeerMemory(dist.group.WORLD, PeerLayout(4, 8, 64, 2, torch.bfloat16))


def check_closing_without_a_rank() -> None:
    """Where rank 1 was missed, the others close their memory without it; it may come later."""
    group, rank = dist.new_group(), dist.get_rank()
    memory: Any = PeerMemory.__new__(PeerMemory)
    memory.group, memory.timeout_us, memory._device = group, 500_000, None
    memory._handle, memory._watchdog = object(), SimpleNamespace(stop=lambda: None)
    memory._view = SimpleNamespace(error=torch.tensor([0 if rank == 1 else 2]))
    start = time.monotonic()
    with mock.patch("torch.cuda.synchronize"):
        if rank == 1:
            dist.barrier()
        memory.close()
        if rank != 1:
            assert 0.4 < time.monotonic() - start < 5
            dist.barrier()
    with pytest.raises(ValueError, match="closed"):
        memory.view  # noqa: B018
    dist.barrier()


def check_too_many_tokens(mover: str) -> None:
    """Rank 1 brings more than the buffer holds: an error on all ranks, and nothing was sent."""
    layout = Layout(dp=4, ep=True)
    groups, rank = make_groups(layout)
    options = MoEOptions(prepare_finalize=mover)
    layer = build(parallel=groups, options=options, max_num_tokens=3)
    with pytest.raises(ValueError, match=r"bring \[2, 5, 2, 2\] tokens, but max_num_tokens is 3"):
        layer(*rows(5 if rank == 1 else 2, rank))
    counts = [2, 5, 2, 2]
    with pytest.raises(ValueError, match="max_num_tokens is 3"):
        layer(*rows(counts[rank], rank), tokens_per_rank=counts)
    assert layer(*rows(3, rank)).isfinite().all()


def check_wrong_counts() -> None:
    groups, rank = make_groups(Layout(dp=4, ep=True))
    layer = build(parallel=groups)
    for counts, message in (
        ([2, 2, 2], r"\[2, 2, 2\] for 2 tokens here and 4 ranks"),
        ([3, 3, 3, 3], "has 2 tokens, tokens_per_rank says 3"),
        ([2, 2, 2, -2], "4 counts of tokens"),
        ([2, 2, 2, 2.5], r"must be integers, got \[2, 2, 2, 2.5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*rows(2, rank), tokens_per_rank=counts)
    replicated = build(parallel=make_groups(Layout(tp=4))[0])
    with pytest.raises(ValueError, match=r"\[2, 2\] for 2 tokens here and 1 ranks"):
        replicated(*rows(2, 0), tokens_per_rank=[2, 2])


def check_counts_that_differ(mover: str) -> None:
    """Each rank's own count is right in what it was given, but not everybody's."""
    groups, rank = make_groups(Layout(dp=4, ep=True))
    options = MoEOptions(prepare_finalize=mover, debug_checks=True)
    layer = build(parallel=groups, options=options)
    T = 3 if rank == 3 else 2
    given = [2, 2, 2, T]
    message = r"bring \[2, 2, 2, 3\] tokens, but tokens_per_rank of rank 0 is \[2, 2, 2, 2\]"
    with pytest.raises(ValueError, match=message):
        layer(*rows(T, rank), tokens_per_rank=given)
    assert layer(*rows(T, rank), tokens_per_rank=[2, 2, 2, 3]).isfinite().all()
    known = {"tokens_per_rank": [2, 2, 2, 3]} if rank else {}  # not given to all
    assert layer(*rows(T, rank), **known).isfinite().all()


def check_shared_tokens_that_differ() -> None:
    """Ranks that should hold the same tokens bring different numbers of them."""
    groups, rank = make_groups(Layout(dp=2, tp=2, ep=True))
    layer = build(parallel=groups, options=MoEOptions(debug_checks=True))
    T = 2 + (dist.get_rank() == 3)
    if rank == 1:
        with pytest.raises(ValueError, match=r"share their tokens, but bring \[2, 3\]"):
            layer(*rows(T, 0))
    else:
        layer(*rows(T, 0))
    assert layer(*rows(2, 0)).isfinite().all()


def check_failing_experts(mover: str) -> None:
    """A LoRA context gets its own ids back where experts fail, and the next forward is right."""
    groups, rank = make_groups(Layout(dp=4, ep=True))
    layer = build(parallel=groups, options=MoEOptions(prepare_finalize=mover))
    kernel = kernel_of(layer)
    own = torch.arange(3, dtype=torch.int32)
    context = SimpleNamespace(token_lora_mapping=own)
    kernel.prepare_finalize.set_lora_context(context)
    with (
        mock.patch.object(kernel.experts, "apply", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        layer(*rows(3, rank))
    assert context.token_lora_mapping is own
    x, logits = rows(3, rank)
    torch.testing.assert_close(layer(x, logits), build()(x, logits), rtol=1e-5, atol=1e-5)
    assert context.token_lora_mapping is own


def check_collectives() -> None:
    """Gather, reduce and exchange on one group and over two, with every dtype's bytes."""
    rank = dist.get_rank()
    whole = make_groups(Layout(dp=2, tp=2, ep=True, sp=True, spanning=True))[0]
    for ranks in (TokenRanks((whole.ep,)), TokenRanks((whole.dp, whole.tp))):
        assert (ranks.size, ranks.rank) == (4, rank)
        for sizes in ([2, 2, 2, 2], [3, 0, 1, 2], [0, 0, 5, 0], [0, 0, 0, 0]):
            parts = [torch.arange(s * 6).view(s, 3, 2) + 100 * r for r, s in enumerate(sizes)]
            for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn):
                found = all_gather_rows(parts[rank].to(dtype), sizes, ranks)()
                assert found.dtype is dtype
                assert torch.equal(found.float(), torch.cat(parts).to(dtype).float())
            generator = torch.Generator().manual_seed(7)
            terms = torch.randn(4, sum(sizes), 5, generator=generator)
            found = reduce_scatter_rows(terms[rank], sizes, ranks)()
            expected = terms.double().sum(0).split(sizes)[rank]
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
            half = reduce_scatter_rows(terms[rank].bfloat16(), sizes, ranks)()
            if len(ranks.axes) == 1:
                exact = sum_in_order(terms.bfloat16()).split(sizes)[rank]
                assert torch.equal(half, exact)
    sent = [(rank + other) % 3 for other in range(4)]
    row = torch.full((sum(sent), 2), float(rank))
    assert exchange_rows(row, sent, sent, whole.ep)()[:, 0].tolist() == [
        float(other) for other in range(4) for _ in range((rank + other) % 3)
    ]


def check_packing() -> None:
    given = [torch.randn(3, 5), torch.arange(3, dtype=torch.int32), torch.randn(3, 2).bfloat16()]
    packed = pack_rows(given)
    assert packed.shape == (3, 64)
    for before, after in zip(given, unpack_rows(packed, given), strict=True):
        assert torch.equal(before, after)
        assert after.is_contiguous()
