"""DeepEP's two modes over a Buffer that moves rows over gloo; runs inside a RankPool."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fake_deep_ep
import pytest
import torch
import torch.distributed as dist
from rank_layers import SPREADS, Layout, make_groups, token_counts

import fake_deep_gemm
from expert_layers import Layer
from fusedmoe import FusedMoE, FusedMoEQuantConfig, MoEOptions
from fusedmoe.distributed.deep_ep import learn_placement, make_deep_ep_buffer
from fusedmoe.distributed.groups import TokenRanks
from fusedmoe.experts.deep_gemm import BatchedDeepGemmExperts, DeepGemmExperts
from fusedmoe.modular_kernel import FusedMoEKernel
from fusedmoe.modular_kernel.forward import finish
from fusedmoe.prepare_finalize.deepep_high_throughput import DeepEPHTPrepareAndFinalize
from fusedmoe.prepare_finalize.deepep_low_latency import DeepEPLLPrepareAndFinalize
from fusedmoe.prepare_finalize.luggage import quantize_input
from fusedmoe.quantization.config import FusedMoEQuantDesc
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    QuantKey,
)
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP
from layer_oracle import Experts
from quantized_experts import Quantized
from quantized_layers import Scheme, draw, fill
from rounded_experts import assert_rounded

E, K, H = 8, 2, 256
COUNTS = [3, 0, 1, 2]
BF16 = torch.bfloat16
MODES: dict[str, Any] = {"high": DeepEPHTPrepareAndFinalize, "low": DeepEPLLPrepareAndFinalize}


OVER_FOUR = Layout(dp=4, ep=True)
LAYOUTS = {
    "dp4": OVER_FOUR,
    "dp2": Layout(dp=2, ep=True),
    "pcp2": Layout(pcp=2, ep=True),
    "pcp4": Layout(pcp=4, ep=True),
    "sp2": Layout(tp=2, ep=True, sp=True),
    "sp4": Layout(tp=4, ep=True, sp=True),
    "dp2_tp2": Layout(dp=2, tp=2, ep=True),
}


def groups_with_buffer(
    low: bool, experts: int = E, hidden: int = H, most: int = 16, layout: Layout = OVER_FOUR
) -> Any:
    """(groups with a buffer, rank among those whose tokens differ), as a program makes them."""
    groups, rank = make_groups(layout)
    over = groups.tp if layout.sp else groups.dp or groups.pcp
    theirs = experts * layout.token_ranks // layout.size
    with mock.patch.dict(sys.modules, deep_ep=fake_deep_ep):
        buffer = make_deep_ep_buffer(over, hidden, theirs, most if low else None)
    return replace(groups, deep_ep=buffer), rank


def mover(mode: str, most: int = 4) -> Any:
    groups, _ = groups_with_buffer(mode == "low", most=most)
    return MODES[mode](groups.deep_ep, ranks=TokenRanks((groups.dp,)), max_num_tokens=most)


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x bf16 [T, H], weights [T, K], ids int32 [T, K]; one is -1, one is out of range."""
    generator = torch.Generator().manual_seed(rank)
    T = COUNTS[rank]
    x = torch.randn(T, H, generator=generator).to(BF16)
    ids = torch.rand(T, E, generator=generator).topk(K).indices.to(torch.int32)
    if T:
        ids[0, 1] = -1
    if T > 1:
        ids[1, 0] = E + 3
    weights = torch.rand(T, K, generator=generator) * (ids >= 0)
    return x, weights, ids


def expert_map(rank: int) -> torch.Tensor:
    """Every fourth id, in the opposite order: not DeepEP's own placement."""
    table = torch.full((E,), -1, dtype=torch.int32)
    table[rank::4] = torch.tensor([1, 0], dtype=torch.int32)
    return table


def rows_key(key: QuantKey | None) -> FusedMoEQuantConfig:
    if key is None:
        return FusedMoEQuantConfig()
    desc = FusedMoEQuantDesc(dtype=key.dtype, shape=key.group_shape, scale_kind=key.scale_kind)
    return FusedMoEQuantConfig(a1=desc, a2=desc)


KEYS = (None, FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0, FP8_DYNAMIC_TOKEN)


def check_high_throughput() -> None:
    """Which rows arrive, with which ids and weights and rounded how; what comes back."""
    rank = dist.get_rank()
    x, weights, ids = batch(rank)
    mine = expert_map(rank)
    where = [
        (r, t)
        for r in range(4)
        for t, picks in enumerate(batch(r)[2].tolist())
        if any(0 <= i < E and mine[i] >= 0 for i in picks)
    ]
    one = mover("high")
    for key in KEYS:
        for deferred in (False, True):
            config = rows_key(key)
            found = one.begin().prepare(x, weights, ids, E, mine, False, config, deferred)
            assert found.hidden_states.shape == (len(where), H)
            for row, (r, t) in enumerate(where):
                theirs = batch(r)
                if key is None or deferred:
                    sent, scale = theirs[0], None
                else:
                    sent, scale = quantize_input(theirs[0], config)
                assert torch.equal(found.hidden_states[row].float(), sent[t].float())
                assert scale is None or torch.equal(found.scale[row], scale[t])
                local = [0 <= i < E and bool(mine[i] >= 0) for i in theirs[2][t].tolist()]
                wanted = [
                    i if here else -1 for i, here in zip(theirs[2][t].tolist(), local, strict=True)
                ]
                assert found.topk_ids[row].tolist() == wanted
                kept = torch.tensor(local)
                assert torch.equal(found.topk_weights[row][kept], theirs[1][t][kept])
            assert found.topk_ids.dtype is ids.dtype
            picked = found.topk_ids[found.topk_ids >= 0].long()
            counts = torch.bincount(mine[picked].long(), minlength=2)
            assert found.expert_tokens_meta.expert_num_tokens.tolist() == counts.tolist()
    block = torch.float8_e4m3fn
    assert one.buffer.sent == [BF16, BF16, block, BF16, block, BF16, BF16, BF16]
    pending = one.begin()
    found = pending.prepare(x, weights, ids, E, mine, False, rows_key(None))
    rows = torch.full((len(where), H), rank + 1.0, dtype=BF16)
    output = torch.full((COUNTS[rank], H), torch.nan, dtype=BF16)
    receive = pending.finalize_async(
        output, rows, found.topk_weights, found.topk_ids, False, TopKWeightAndReduceNoOP()
    )
    assert output.isnan().all(), "nothing is there before the receiver"
    receive()
    for t in range(COUNTS[rank]):
        hosts = {i % 4 for i in ids[t].tolist() if 0 <= i < E}
        assert (output[t] == sum(host + 1 for host in hosts)).all()


def check_low_latency() -> None:
    """Every pick stands with its expert once, rounded as asked; the way back weights and sums."""
    rank = dist.get_rank()
    x, weights, ids = batch(rank)
    mine = expert_map(rank)
    one = mover("low")
    everyones = [
        (mine[i].item(), r, t)
        for r in range(4)
        for t, picks in enumerate(batch(r)[2].tolist())
        for i in picks
        if 0 <= i < E and mine[i] >= 0
    ]
    for key in KEYS:
        config = rows_key(key)
        pending = one.begin()
        started = pending.prepare_async(x, weights, ids, E, mine, False, config)
        hook, receive = started
        hook()
        found = receive()
        counts = found.expert_tokens_meta.expert_num_tokens
        assert found.hidden_states.shape == (2, 4 * 4, H)
        assert found.topk_ids is found.topk_weights is None
        assert counts.tolist() == [sum(e == local for e, _, _ in everyones) for local in range(2)]
        for local in range(2):
            sources = [batch(r)[0][t] for e, r, t in everyones if e == local]
            wanted = torch.stack(sources) if sources else x.new_empty(0, H)
            rows = found.hidden_states[local, : counts[local]]
            assert key is None or rows.dtype is torch.float8_e4m3fn
            scale = None
            if key is not None:
                wanted, scale = quantize_input(wanted, config)
                groups = found.scale.shape[-1]
                spread = found.scale[local, : counts[local]].repeat_interleave(H // groups, 1)
                rows = rows.float() * spread
                wanted = wanted.float() * scale.repeat_interleave(H // groups, 1)
            order = rows.float().sort(0).values, wanted.float().sort(0).values
            torch.testing.assert_close(*order, rtol=1e-6, atol=0)
        output = torch.full((COUNTS[rank], H), torch.nan, dtype=BF16)
        routed = torch.full((2, 16, H), rank + 1.0, dtype=BF16)
        finish(
            pending.finalize_async(
                output, routed, weights, ids, False, TopKWeightAndReduceDelegate()
            )
        )
        inside = (ids >= 0) & (ids < E)
        hosts = torch.where(inside, ids % 4 + 1, 0)
        total = (weights * hosts).sum(1, keepdim=True).expand(-1, H).to(BF16)
        torch.testing.assert_close(output, total)
    assert one.buffer.sent == [BF16, torch.float8_e4m3fn, torch.float8_e4m3fn, BF16]


def check_refusals() -> None:
    rank = dist.get_rank()
    x, weights, ids = batch(rank)
    for mode in MODES:
        one = mover(mode, most=2)
        arguments = (E, expert_map(rank), False, FusedMoEQuantConfig())
        assert one.topk_indices_dtype() is torch.int64
        assert one.supports_async()
        one.set_lora_context(None)
        with pytest.raises(ValueError, match="cannot send adapter ids"):
            one.set_lora_context(SimpleNamespace(token_lora_mapping=torch.zeros(3)))
        with pytest.raises(ValueError, match=r"ranks bring \[3, 0, 1, 2\] tokens, but max_num"):
            one.begin(COUNTS).prepare(x, weights, ids, *arguments)
        with pytest.raises(ValueError, match="needs the expert map of 8 experts, got None"):
            one.prepare(x[:2], weights[:2], ids[:2], E, None, False, FusedMoEQuantConfig())
    with pytest.raises(ValueError, match="one scale for all rows"):
        one.prepare(x[:2], weights[:2], ids[:2], *arguments[:3], rows_key(FP8_DYNAMIC_TENSOR))
    with pytest.raises(ValueError, match="leave TopKWeightAndReduceNoOP"):
        one.finalize(x, x, weights, ids, False, TopKWeightAndReduceNoOP())
    table = torch.full((E,), -1, dtype=torch.int32)
    table[: rank + 1] = torch.arange(rank + 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"as many experts on each rank, they have \[1, 2, 3, 4\]"):
        learn_placement(table, one.ranks)
    found = learn_placement(expert_map(rank), one.ranks)
    assert found.position.tolist() == [1, 3, 5, 7, 0, 2, 4, 6]
    assert found.global_id.tolist() == [rank + 4, rank]


def check_buffers() -> None:
    """Sizes are the package's; it is made for one of the modes."""
    high, _ = groups_with_buffer(False)
    assert high.deep_ep.num_nvl_bytes == 9 * H * 2 * 4
    assert not high.deep_ep.low_latency_mode
    low, _ = groups_with_buffer(True, most=5)
    assert low.deep_ep.num_rdma_bytes == 5 * E * (H * 2 + 16)
    assert low.deep_ep.num_qps_per_rank == 2
    with pytest.raises(ValueError, match="6 experts are not as many on each of 4 ranks"):
        groups_with_buffer(False, experts=6)
    with (
        mock.patch.dict(sys.modules, deep_ep=None),
        pytest.raises(ImportError, match="needs the package deep_ep"),
    ):
        make_deep_ep_buffer(high.dp, H, E)


def check_layer(
    mode: str,
    placement: str = "linear",
    weight_on_input: bool = False,
    redundant: int = 0,
    layout: str = "dp4",
) -> None:
    """The layer's output is that of one rank, and the same bits again."""
    where = LAYOUTS[layout]
    low = mode == "low"
    hidden, width = (2048, 32) if low else (H, 24)
    groups, rank = groups_with_buffer(low, E + redundant, hidden, layout=where)
    scheme = Scheme("int4_g32") if low else None
    name = MODES[mode].name
    picked = "torch_quantized_batched" if low else "torch"
    top_k = 1 if weight_on_input else K
    common: dict[str, Any] = {
        "quant_config": scheme,
        "apply_router_weight_on_input": weight_on_input,
        "max_num_tokens": 16,
        "renormalize": not weight_on_input,
    }
    sizes = (E, top_k, hidden, width, BF16)
    alone = FusedMoE(*sizes, options=MoEOptions(experts=picked.replace("_batched", "")), **common)
    options = MoEOptions(experts=picked, prepare_finalize=name)
    apart: dict[str, Any] = {"parallel": groups, "is_sequence_parallel": where.sp}
    layer = FusedMoE(*sizes, options=options, expert_placement=placement, **apart, **common)
    if low:
        w13, w2 = (
            draw("int4_g32", E, 2 * width, hidden, shards=2),
            draw("int4_g32", E, hidden, width),
        )
        fill(alone, w13, w2)
        fill_some(layer, w13, w2)
    else:
        for one in (alone, layer):
            one.load_weights(Experts.random(E, hidden, width).named())
    for spread in (*SPREADS, "to_one_rank"):
        kind = "uneven" if spread == "to_one_rank" else spread
        counts = token_counts(kind, where.token_ranks)
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(counts[rank], hidden, generator=generator).to(BF16)
        logits = torch.randn(counts[rank], E, generator=generator)
        if spread == "to_one_rank":
            logits[:, :top_k] += 100
        found, expected = layer(x, logits), alone(x, logits)
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        assert torch.equal(found, layer(x, logits))
    selection = layer.routed_experts.quant_method.select(layer.routed_experts)
    assert selection.prepare_finalize is MODES[mode]


def fill_some(layer: Any, w13: Any, w2: Any) -> None:
    """The experts of this rank."""
    ids = layer.routed_experts.expert_map
    mine = (ids >= 0).nonzero()[:, 0]
    order = mine[ids[mine].argsort()]
    with torch.no_grad():
        for owner, weight in (("w13", w13), ("w2", w2)):
            for part, suffix in (("data", "weight"), ("scale", "weight_scale")):
                parameter = getattr(layer.routed_experts, f"{owner}_{suffix}")
                parameter.copy_(weight.parts()[part][order].reshape(parameter.shape))
    layer.routed_experts.process_weights_after_loading()


def check_with_deep_gemm(mode: str) -> None:
    """fp8 rows from the wire straight into the other package's GEMMs."""
    rank, low = dist.get_rank(), mode == "low"
    layer = Layer(T=COUNTS[rank], E=E, H=H, I=128, dtype=BF16, seed=rank)
    case = Quantized("fp8_block", FP8_DYNAMIC_128, layer)
    tensors = layer.tensors()
    shared = Layer(E=E, H=H, I=128, dtype=BF16).tensors()
    tensors["w1"], tensors["w2"] = shared["w1"], shared["w2"]
    mine = expert_map(rank)
    order = (mine >= 0).nonzero()[:, 0]
    order = order[mine[order].argsort()]
    local = Quantized("fp8_block", FP8_DYNAMIC_128, layer)
    w1, w2, config = local.config(tensors | {n: tensors[n][order] for n in ("w1", "w2")})
    with mock.patch.dict(sys.modules, deep_gemm=fake_deep_gemm):
        experts = (
            BatchedDeepGemmExperts(layer.config(), config, 4, 4)
            if low
            else DeepGemmExperts(layer.config(), config)
        )
        one = mover(mode)
        found = FusedMoEKernel(one, experts).apply(
            tensors["hidden_states"],
            w1.data,
            w2.data,
            tensors["topk_weights"],
            tensors["topk_ids"],
            activation=layer.activation,
            global_num_experts=E,
            expert_map=mine,
        )
    assert one.buffer.sent == [torch.float8_e4m3fn]
    if layer.T:
        # Each rank's sum crosses the wire in bf16.
        assert_rounded(found, case, tensors, 8e-3)
