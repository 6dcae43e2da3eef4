"""The prepare/finalize objects by themselves, over several ranks; runs inside a RankPool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_layers import Layout, make_groups

from fusedmoe import FusedMoEQuantConfig
from fusedmoe.distributed.groups import TokenRanks
from fusedmoe.modular_kernel.forward import finish
from fusedmoe.prepare_finalize.all_to_all import AllToAllPrepareAndFinalize
from fusedmoe.prepare_finalize.luggage import quantize_input
from fusedmoe.prepare_finalize.naive_dp_ep import (
    MoEPrepareAndFinalizeNaiveDPEPModular,
    MoEPrepareAndFinalizeNaiveDPEPMonolithic,
)
from fusedmoe.quantization.config import FusedMoEQuantDesc
from fusedmoe.quantization.keys import PER_TENSOR, PER_TOKEN, GroupShape
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP

E, K, H = 8, 2, 16
COUNTS = [3, 0, 1, 2]
PLAIN = FusedMoEQuantConfig()
MOVERS: dict[str, Any] = {
    "naive_dp_ep": MoEPrepareAndFinalizeNaiveDPEPModular,
    "all_to_all": AllToAllPrepareAndFinalize,
}


def ranks() -> TokenRanks:
    return TokenRanks((make_groups(Layout(dp=4, ep=True))[0].dp,))


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], weights [T, K], ids [T, K] of one rank; one id of each token may be -1."""
    generator = torch.Generator().manual_seed(rank)
    T = COUNTS[rank]
    x = torch.randn(T, H, generator=generator)
    ids = torch.rand(T, E, generator=generator).topk(K).indices.to(torch.int32)
    if T:
        ids[0, 1] = -1
    weights = torch.rand(T, K, generator=generator) * (ids >= 0)
    return x, weights, ids


def expert_map(rank: int) -> torch.Tensor:
    """Two experts on each rank, every fourth id."""
    table = torch.full((E,), -1, dtype=torch.int32)
    table[rank::4] = torch.arange(2, dtype=torch.int32)
    return table


def to_float8(
    a1: torch.Tensor, quant_config: FusedMoEQuantConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two groups per row, as fp8 with a scale each."""
    groups = a1.view(a1.shape[0], 2, H // 2)
    scale = groups.abs().amax(-1).clamp_min(1e-10) / 448
    return (groups / scale[..., None]).to(torch.float8_e4m3fn).view(a1.shape), scale


def to_static(
    a1: torch.Tensor, quant_config: FusedMoEQuantConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    return (a1 / 0.5).to(torch.float8_e4m3fn), torch.tensor([0.5])


def sources(mover: str) -> list[tuple[int, int]]:
    """(rank, token) of each row that this rank's experts get."""
    mine = expert_map(dist.get_rank())
    found = []
    for rank, count in enumerate(COUNTS):
        ids = batch(rank)[2].long()
        for t in range(count):
            here = any(i >= 0 and mine[i] >= 0 for i in ids[t].tolist())
            if mover == "naive_dp_ep" or here:
                found.append((rank, t))
    return found


def check_rows(mover: str) -> None:
    """What arrives: each row with its ids, weights, scales and adapter; what is sent stays."""
    rank, where = dist.get_rank(), sources(mover)
    x, weights, ids = batch(rank)
    kept = x.clone()
    for quantize in (None, to_float8, to_static):
        options = {} if quantize is None else {"quantize": quantize}
        one = MOVERS[mover](False, 4, ranks=ranks(), **options)
        mapping = torch.arange(COUNTS[rank] + 5, dtype=torch.int32) + 10 * rank
        context = SimpleNamespace(token_lora_mapping=mapping)
        one.set_lora_context(context)
        found = one.prepare(x, weights, ids, E, expert_map(rank), False, PLAIN)
        assert torch.equal(x, kept)
        assert found.hidden_states.shape == (len(where), H)
        assert context.token_lora_mapping.tolist() == [10 * r + t for r, t in where]
        for row, (r, t) in enumerate(where):
            theirs = batch(r)
            sent, scale = (theirs[0], None) if quantize is None else quantize(theirs[0], PLAIN)
            assert torch.equal(found.hidden_states[row].float(), sent[t].float())
            assert torch.equal(found.topk_weights[row], theirs[1][t])
            assert torch.equal(found.topk_ids[row], theirs[2][t])
            if quantize is to_float8:
                assert torch.equal(found.scale[row], scale[t])
        if quantize is to_static:
            assert found.scale.tolist() == [0.5]
        if quantize is to_float8:
            assert found.hidden_states.dtype is torch.float8_e4m3fn
        output = torch.full((COUNTS[rank], H), float("nan"))
        rows = torch.ones(len(where), H) * (rank + 1)
        one.finalize(
            output, rows, found.topk_weights, found.topk_ids, False, TopKWeightAndReduceNoOP()
        )
        assert context.token_lora_mapping is mapping
        for t in range(COUNTS[rank]):
            hosts = {i % 4 for i in ids[t].tolist() if i >= 0}
            total = 10 if mover == "naive_dp_ep" else sum(host + 1 for host in hosts)
            assert (output[t] == total).all()


def check_two_batches(mover: str) -> None:
    """Two forwards on their way at once, the shorter form of overlapping micro-batches."""
    rank = dist.get_rank()
    x, weights, ids = batch(rank)
    shared = MOVERS[mover](ranks=ranks())
    table = expert_map(rank)
    one, two = shared.begin(), shared.begin()
    first = finish(one.prepare_async(x, weights, ids, E, table, False, PLAIN))
    half = (x[: len(x) // 2], weights[: len(x) // 2], ids[: len(x) // 2])
    second = finish(two.prepare_async(*half, E, table, False, PLAIN))
    outputs = [torch.full_like(part, float("nan")) for part in (x, half[0])]
    pending = [
        mover_.finalize_async(
            output,
            got.hidden_states[:, None, :].expand(-1, K, -1).contiguous(),
            got.topk_weights,
            got.topk_ids,
            False,
            TopKWeightAndReduceDelegate(),
        )
        for mover_, output, got in ((one, outputs[0], first), (two, outputs[1], second))
    ]
    for one_pending in pending:
        finish(one_pending)
    for output, (rows, w, chosen) in zip(outputs, ((x, weights, ids), half), strict=True):
        if mover == "naive_dp_ep":
            expected = 4 * rows * w.sum(1, keepdim=True)
        else:
            hosts = [len({i % 4 for i in row if i >= 0}) for row in chosen.tolist()]
            expected = rows * w.sum(1, keepdim=True) * torch.tensor(hosts)[:, None]
        torch.testing.assert_close(output, expected)


def check_weight_on_input(mover: str) -> None:
    rank = dist.get_rank()
    x, weights, ids = batch(rank)
    one = MOVERS[mover](ranks=ranks())
    arguments = (E, expert_map(rank), True, PLAIN)
    found = one.prepare(x, weights[:, :1], ids[:, :1], *arguments)
    assert found.hidden_states.shape[1] == H
    with pytest.raises(ValueError, match="top-1 routing, got K = 2"):
        one.begin().prepare(x, weights, ids, *arguments)
    if mover == "naive_dp_ep":
        expected = torch.cat([batch(r)[0] * batch(r)[1][:, :1] for r in range(4)])
        assert torch.equal(found.hidden_states, expected)


def check_monolithic() -> None:
    rank = dist.get_rank()
    x, logits, _ = batch(rank)
    one = MoEPrepareAndFinalizeNaiveDPEPMonolithic(ranks=ranks(), quantize=to_float8)
    mapping = torch.arange(COUNTS[rank], dtype=torch.int32) + 10 * rank
    context = SimpleNamespace(token_lora_mapping=mapping)
    one.set_lora_context(context)
    rows, scale, all_logits = one.prepare(x, logits, PLAIN)
    everyones = [10 * r + t for r in range(4) for t in range(COUNTS[r])]
    assert context.token_lora_mapping.tolist() == everyones
    sent = [to_float8(batch(r)[0], PLAIN) for r in range(4)]
    assert torch.equal(rows.float(), torch.cat([part.float() for part, _ in sent]))
    assert torch.equal(scale, torch.cat([part for _, part in sent]))
    assert torch.equal(all_logits, torch.cat([batch(r)[1] for r in range(4)]))
    assert torch.equal(one.finalize(rows.float()), 4 * to_float8(x, PLAIN)[0].float())
    assert context.token_lora_mapping is mapping


def check_quantized_before_sending(mover: str) -> None:
    """By itself: per row, per 8 columns, with one scale given, with one found on each rank."""
    rank, where = dist.get_rank(), sources(mover)
    for shape, given in (
        (PER_TOKEN, None),
        (GroupShape(1, 8), None),
        (PER_TENSOR, 0.01),
        (PER_TENSOR, None),
    ):
        fixed = None if given is None else torch.tensor([given])
        desc = FusedMoEQuantDesc(dtype=torch.float8_e4m3fn, shape=shape, scale=fixed)
        config = FusedMoEQuantConfig(a1=desc)
        one = MOVERS[mover](ranks=ranks())
        found = one.prepare(*batch(rank), E, expert_map(rank), False, config)
        for row, (r, t) in enumerate(where):
            rows, scale = quantize_input(batch(r)[0], config)
            assert torch.equal(found.hidden_states[row].float(), rows[t].float())
            if given is None:
                assert torch.equal(found.scale[row], scale[t])
        if given is not None:
            assert torch.equal(found.scale, fixed)
        deferred = one.begin().prepare(*batch(rank), E, expert_map(rank), False, config, True)
        assert deferred.hidden_states.dtype is torch.float32


def check_refusals() -> None:
    rank = dist.get_rank()
    x, weights, ids = batch(rank)
    for cls in MOVERS.values():
        one = cls(ranks=ranks())
        one.set_lora_context(SimpleNamespace(token_lora_mapping=torch.zeros(9)))
        with pytest.raises(ValueError, match="token_lora_mapping must be int32"):
            one.prepare(x, weights, ids, E, expert_map(rank), False, PLAIN)
        with pytest.raises(ValueError, match="num_dispatchers 3, but 4 ranks"):
            cls(False, 3, ranks=ranks())
    with pytest.raises(ValueError, match="needs the expert map of 8 experts, got None"):
        AllToAllPrepareAndFinalize(ranks=ranks()).prepare(x, weights, ids, E, None, False, PLAIN)
