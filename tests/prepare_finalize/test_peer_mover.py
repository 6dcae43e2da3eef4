"""The prepare/finalize over peer memory; all ranks live in this process, under the interpreter."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedmoe import FusedMoEConfig, FusedMoEQuantConfig, MoEActivation, MoEOptions, ParallelGroups
from fusedmoe.config import FusedMoEParallelConfig
from fusedmoe.distributed.groups import TokenRanks
from fusedmoe.distributed.peer_memory import PeerMemory, first_view
from fusedmoe.kernels.peer_all_to_all import combine_reference
from fusedmoe.kernels.peer_layout import PeerLayout, PeerSums, PeerView
from fusedmoe.kernels.peer_picks import push_rows_reference
from fusedmoe.modular_kernel import FinalizeWork, FusedMoEKernel, PrepareWork
from fusedmoe.modular_kernel.forward import finish
from fusedmoe.prepare_finalize.batched import rows_by_expert
from fusedmoe.prepare_finalize.dispatch import Hosts
from fusedmoe.prepare_finalize.peer import PeerPrepareAndFinalize
from fusedmoe.prepare_finalize.peer_batched import PeerBatchedPrepareAndFinalize
from fusedmoe.quantization.keys import FP8_DYNAMIC_128
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP

pytest.importorskip("triton")

WORLD, E, K, H = 2, 4, 2, 32
OWNERS = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
LAYOUT = PeerLayout(WORLD, 5, H, K, torch.float32)
PLAIN = FusedMoEQuantConfig()


class Memory:
    """What a PeerMemory is to the movers, on the CPU: each rank's views of all ranks' buffers."""

    timeout_us = 0
    layout = LAYOUT
    send_sums_from: int | None = None
    push_rows_from: int | None = None

    def __init__(self, view: PeerView) -> None:
        self.view = view

    def pushes_rows(self, rows: int) -> bool:
        return self.push_rows_from is not None and rows >= self.push_rows_from

    def spans(self, group: Any) -> bool:
        return group.size() == WORLD

    def check(self) -> None:
        assert self.view.error.item() == 0


def memories() -> list[Memory]:
    buffers = []
    for _ in range(WORLD):
        memory = torch.full((LAYOUT.nbytes + 256,), 0xFF, dtype=torch.uint8)
        buffers.append(memory[-memory.data_ptr() % 256 :][: LAYOUT.nbytes])
    bases = torch.tensor([one.data_ptr() for one in buffers])
    return [Memory(first_view(LAYOUT, rank, bases, own)) for rank, own in enumerate(buffers)]


def movers(
    kind: type[PeerPrepareAndFinalize] = PeerPrepareAndFinalize,
) -> tuple[list[Any], list[torch.Tensor]]:
    made, maps = [], []
    for rank, memory in enumerate(memories()):
        axis: Any = SimpleNamespace(size=lambda: WORLD, rank=lambda rank=rank: rank)
        one = kind(ranks=TokenRanks((axis,)), max_num_tokens=10)
        one.memory = memory  # type: ignore[assignment]
        if isinstance(one, PeerBatchedPrepareAndFinalize):
            one.num_local_experts = 2
        expert_map = torch.where(rank == OWNERS, torch.arange(E).int() % 2, -1).int()
        table = torch.arange(WORLD)[:, None] == OWNERS
        one._learnt[:] = [Hosts(expert_map, table, OWNERS)]
        made.append(one)
        maps.append(expert_map)
    return made, maps


def batch(T: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator)
    return (
        x,
        torch.rand(T, K, generator=generator),
        torch.randint(-1, E, (T, K), generator=generator).int(),
    )


@pytest.fixture(params=["fetched", "sent", "pushed"])
def sends_sums(request, monkeypatch):
    """Whether the ranks leave their parts of sums to be fetched, or send them: also experts that
    know of no rows of picks, where those would be taken."""
    if request.param != "fetched":
        name = "send_sums_from" if request.param == "sent" else "push_rows_from"
        monkeypatch.setattr(Memory, name, 1)
    return request.param != "fetched"


@pytest.mark.parametrize("counts", [[3, 2], [5, 0], [0, 1]])
def test_sums_come_back_from_where_they_were_left(sends_sums, counts):
    """Two forwards over the same memory: sent, announced, then fetched."""
    everyone, maps = movers()
    assert all(one.supports_async() and one.concurrent_forwards() == 1 for one in everyone)
    for turn in range(2):
        batches = [batch(T, 10 * turn + r) for r, T in enumerate(counts)]
        started = [one.begin(counts) for one in everyone]
        pending = [
            one.prepare_async(*batches[r], E, maps[r], False, PLAIN)
            for r, one in enumerate(started)
        ]
        written, back = [], []
        outs = [torch.full((T, H), float("nan")) for T in counts]
        for rank, one in enumerate(started):
            rows, _, _, ids, weights = finish(pending[rank])
            output = one.expert_output()
            assert isinstance(output, PeerSums) == sends_sums
            used = (ids >= 0).any(dim=1)
            output[used] = rows[used] * (rank + 2) + turn
            written.append(output)
            back.append(
                one.finalize_async(
                    *(outs[rank], output, weights, ids, False),
                    TopKWeightAndReduceNoOP(),
                )
            )
        for rank, fetch in enumerate(back):
            finish(fetch)
            ids, rows = batches[rank][2], max(counts)
            want = combine_reference(written, ids, OWNERS, LAYOUT, rows, rank)
            assert torch.equal(outs[rank], want)
            started[rank].memory.check()


def test_more_tokens_than_there_are_rows_for():
    """An error on every rank, and nothing has been written anywhere."""
    everyone, maps = movers()
    before = [one.memory.view.own.clone() for one in everyone]
    counts = [2, 11]
    for rank, one in enumerate(everyone):
        with pytest.raises(ValueError, match=r"bring \[2, 11\] tokens, but max_num_tokens is 10"):
            one.begin(counts).prepare(*batch(counts[rank], rank), E, maps[rank], False, PLAIN)
        assert torch.equal(one.memory.view.own, before[rank])


def test_rows_in_another_format_are_refused_when_the_layer_is_built():
    """On a GPU: one that is built on a CPU may be moved to where other experts run it."""
    [mover, _], _ = movers()
    experts: Any = SimpleNamespace(
        activation_format=lambda: PeerPrepareAndFinalize.row_format,
        takes_late_rows=False,
        expects_unquantized_inputs=False,
        quant_config=SimpleNamespace(a1=SimpleNamespace(key=FP8_DYNAMIC_128)),
        moe_config=SimpleNamespace(device=torch.device("cpu")),
    )
    FusedMoEKernel(mover, experts)
    experts.moe_config.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"take rows in .*, the buffers .* hold torch.float32"):
        FusedMoEKernel(mover, experts)
    experts.expects_unquantized_inputs = True
    FusedMoEKernel(mover, experts)


def test_outputs_elsewhere_are_weighted_into_the_buffer(sends_sums):
    """Experts that leave every pick's output [rows, K, H] behind them."""
    everyone, maps = movers()
    counts = [2, 3]
    batches = [batch(T, r) for r, T in enumerate(counts)]
    started = [one.begin(counts) for one in everyone]
    pending = [
        one.prepare_async(*batches[r], E, maps[r], False, PLAIN) for r, one in enumerate(started)
    ]
    back, outs = [], [torch.full((T, H), float("nan")) for T in counts]
    for rank, one in enumerate(started):
        got = finish(pending[rank])
        slots = got.hidden_states[:, None].expand(-1, K, -1).nan_to_num().contiguous()
        weights = torch.where(got.topk_ids >= 0, got.topk_weights, 0)
        back.append(
            one.finalize_async(
                *(outs[rank], slots, weights, got.topk_ids, False), TopKWeightAndReduceDelegate()
            )
        )
    for rank, (x, weights, ids) in enumerate(batches):
        finish(back[rank])
        want = x * (weights * (ids >= 0)).sum(dim=1, keepdim=True)
        torch.testing.assert_close(outs[rank], want)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_rows_of_picks_are_weighted_where_they_arrive(monkeypatch, on_input, waits):
    """One rank's experts push rows, the other's leave a sum; so it is told to both. Weights that
    the input had are not taken again."""
    monkeypatch.setattr(Memory, "push_rows_from", 1)
    monkeypatch.setattr(PrepareWork, "weighted_input", property(lambda self: self.a1))
    everyone, maps = movers()
    counts = [2, 3]
    batches = [batch(T, r) for r, T in enumerate(counts)]
    started = [one.begin(counts) for one in everyone]
    pending = [
        one.prepare_async(*batches[r], E, maps[r], on_input, PLAIN) for r, one in enumerate(started)
    ]
    received = [finish(one) for one in pending]
    inboxes = [one.memory.view.received(3).picks for one in started]
    back, outs = [], [torch.full((T, H), float("nan")) for T in counts]
    for rank, (one, got) in enumerate(zip(started, received, strict=True)):
        rows = got.hidden_states[:, None].expand(-1, K, -1).nan_to_num().reshape(-1, H)
        weights = torch.where(got.topk_ids >= 0, 1.0 if on_input else got.topk_weights, 0)
        output = one.expert_output()
        assert output.takes_picks
        if rank == 1:
            push_rows_reference(inboxes, rows, got.topk_ids, LAYOUT, 3)
            output.sent = output.pushed = True
        else:
            output.copy_(rows.view(-1, K, H).mul(weights[..., None]).sum(dim=1))
        work = FinalizeWork(
            *(outs[rank], output, got.topk_weights, got.topk_ids, on_input),
            TopKWeightAndReduceNoOP(),
        )
        if waits:
            own = one.memory.view.own  # as the other's launch would do meanwhile
            own[LAYOUT.combine_flags_at :][:8].view(torch.int32)[:] = 1
            own[LAYOUT.kinds_at :][:8].view(torch.int32)[:] = torch.arange(2)
        back.append(
            (lambda one=one, work=work: one.combine(work)) if waits else one.start_combine(work)
        )
    for rank, (x, weights, ids) in enumerate(batches):
        finish(back[rank])
        factor = ((ids >= 0) * (1.0 if on_input else weights)).sum(dim=1, keepdim=True)
        torch.testing.assert_close(outs[rank], x * factor)
        kinds = started[rank].memory.view.own[LAYOUT.kinds_at :][:8].view(torch.int32)
        assert kinds.tolist() == [0, 1]


@pytest.mark.parametrize("counts", [[3, 2], [0, 5], [1, 0]])
def test_rows_stand_with_their_experts(sends_sums, counts):
    """Those of one expert side by side, in the order of ranks and tokens; weighted on the way
    back. Experts write rows in use alone."""
    everyone, maps = movers(kind=PeerBatchedPrepareAndFinalize)
    batches = [batch(T, r) for r, T in enumerate(counts)]
    started = [one.begin(counts) for one in everyone]
    pending = [
        one.prepare_async(*batches[r], E, maps[r], False, PLAIN) for r, one in enumerate(started)
    ]
    back, outs = [], [torch.full((T, H), float("nan")) for T in counts]
    for rank, one in enumerate(started):
        one.num_local_experts = 2
        got = finish(pending[rank])
        rows = WORLD * max(max(counts), 1)
        assert got.hidden_states.shape == (2, rows, H)
        routed = torch.full((2, rows, H), float("nan"))
        for e in range(2):
            expert = 2 * rank + e
            wanted = [x[t] for x, _, ids in batches for t, _ in (ids == expert).nonzero().tolist()]
            count = int(got.expert_tokens_meta.expert_num_tokens[e])
            assert count == len(wanted)
            for row, x in enumerate(wanted):
                assert torch.equal(got.hidden_states[e, row], x)
            routed[e, :count] = got.hidden_states[e, :count] * (expert + 1)
        back.append(
            one.finalize_async(
                *(outs[rank], routed, got.topk_weights, got.topk_ids, False),
                TopKWeightAndReduceDelegate(),
            )
        )
    for rank, (x, weights, ids) in enumerate(batches):
        finish(back[rank])
        factor = (torch.where(ids >= 0, ids + 1, 0) * weights).sum(dim=1, keepdim=True)
        torch.testing.assert_close(outs[rank], x * factor)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
def test_scales_go_with_their_rows(dtype):
    """An expert without room drops its last row; a tensor of any strides."""
    rows = (torch.arange(8).view(4, 2) * 8.0).to(dtype).t().contiguous().t()
    local = torch.tensor([[0, 2], [2, -1], [-1, -1], [2, 0]])
    tensors, counts = rows_by_expert([rows, torch.arange(4.0)[:, None]], local, 3, 2)
    assert counts.tolist() == [2, 0, 2]
    for e, wanted in ((0, [0, 3]), (2, [0, 1])):
        assert torch.equal(tensors[0][e].float(), rows.float()[wanted])
        assert tensors[1][e, :, 0].tolist() == wanted


def config(**options: Any) -> FusedMoEConfig:
    return FusedMoEConfig(
        num_experts=E,
        experts_per_token=K,
        hidden_dim=H,
        intermediate_size_per_partition=8,
        num_local_experts=2,
        activation=MoEActivation.SILU,
        in_dtype=torch.float32,
        device=torch.device("cuda"),
        moe_parallel_config=FusedMoEParallelConfig(1, 1, 2, 2, 0, 0, 0, 0, use_ep=True),
        options=MoEOptions(**options),
    )


def test_what_the_options_of_a_layer_change():
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    groups = ParallelGroups(
        dp=group,
        ep=group,
        enable_expert_parallel=True,
        peers=memories()[0],  # type: ignore[arg-type]
    )
    assert PeerPrepareAndFinalize.unmet_requirement(config(), groups) is None
    kept = PeerPrepareAndFinalize.make(config(batch_invariant=True), groups)
    assert not kept._may_send_sums  # which way it is follows from the size of the batch
    kept._rows = 1
    groups.peers.push_rows_from = 1
    assert not kept._takes_picks
    assert PeerPrepareAndFinalize.make(config(), groups)._may_send_sums
    assert PeerPrepareAndFinalize.make(config(), groups).max_num_tokens == LAYOUT.rows


def test_the_memory_is_that_of_the_ranks_whose_tokens_differ():
    """A layer over other ranks would write where nobody of them looks."""
    group: Any = SimpleNamespace(size=lambda: 4, rank=lambda: 0)
    groups = ParallelGroups(dp=group, enable_expert_parallel=True, peers=memories()[0])
    parallel = FusedMoEParallelConfig(1, 1, 4, 4, 0, 0, 0, 0, use_ep=True)
    moe = replace(config(), moe_parallel_config=parallel)
    found = PeerPrepareAndFinalize.unmet_requirement(moe, groups)
    assert found == "has buffers of 2 ranks, not of the 4 whose tokens differ"


@pytest.mark.parametrize(
    ("world", "picks", "key", "copied"),
    [
        (2, 8, None, True),
        (2, 8, FP8_DYNAMIC_128, False),
        (4, 8, FP8_DYNAMIC_128, True),
        (8, 8, None, False),
        (4, 2, None, False),
    ],
)
def test_rows_are_copied_where_few_are_wasted(world, picks, key, copied):
    memory: Any = object.__new__(PeerMemory)
    layout = PeerLayout(world, 8192, 256, picks, torch.bfloat16, key)
    memory._view, memory.copy_rows_from = SimpleNamespace(layout=layout), 4096
    assert memory.copies_rows(4096) == copied
    assert not memory.copies_rows(4095)
    memory.copy_rows_from = None
    assert not memory.copies_rows(8192)


def test_rows_are_pushed_where_there_is_room_for_them():
    memory: Any = object.__new__(PeerMemory)
    layout = PeerLayout(2, 64, 256, 2, torch.bfloat16, pushed_rows=32)
    memory._view, memory.push_rows_from = SimpleNamespace(layout=layout), 8
    assert [memory.pushes_rows(rows) for rows in (7, 8, 32, 33)] == [False, True, True, False]
    memory.push_rows_from = None
    assert not memory.pushes_rows(8)


def test_nobody_is_asked_within_a_graph(monkeypatch):
    """Who has which expert is learnt before: in a graph it is known only once that has run."""
    everyone, maps = movers()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert everyone[0].hosts_of(E, maps[0]).owners is OWNERS
    with pytest.raises(ValueError, match="which of 4 experts"):
        everyone[0].hosts_of(E, maps[0].clone())


def test_a_forward_that_fails_takes_the_memory_with_it(monkeypatch):
    """Other ranks wait for its sums; the next forward would be taken for it."""
    gave_up = []
    monkeypatch.setattr(Memory, "give_up", lambda self: gave_up.append(1), raising=False)
    everyone = movers()[0]
    everyone[0].begin([1, 1]).abandon()
    assert gave_up == [1]


def test_adapter_ids_are_not_silently_dropped():
    one = movers()[0][0]
    one.set_lora_context(None)
    with pytest.raises(ValueError, match="cannot send adapter ids"):
        one.set_lora_context(SimpleNamespace(token_lora_mapping=torch.zeros(1)))
