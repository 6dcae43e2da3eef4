"""Balancing over real ranks: outputs stay, weights move, load becomes even. Inside a RankPool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_layers import Layout, make_groups

from fusedmoe import FusedMoE, MoEOptions, OnlineQuantization, ParallelGroups
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.eplb.balancer import EPLBConfig, ExpertBalancer
from fusedmoe.eplb.executor import ExpertMover, expert_bytes, reshard_experts
from fusedmoe.eplb.maps import imbalance, rank_loads
from fusedmoe.eplb.planner import rebalance_experts
from fusedmoe.eplb.transfer import make_transfer_plan
from fusedmoe.kernels.peer_layout import PeerLayout
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.runner.capture import record_graph
from layer_oracle import Experts

E, K, H, I, REDUNDANT, LAYERS = 12, 2, 8, 6, 4, 3  # noqa: E741
LAYOUT = Layout(dp=4, ep=True, spanning=True)


def everyone() -> Layout:
    """All ranks of the pool (four on CPUs)."""
    return Layout(dp=dist.get_world_size(), ep=True, spanning=True)


def build(layer: int, parallel: ParallelGroups | None = None, **arguments: Any):
    made = FusedMoE(E, K, H, I, torch.float32, parallel=parallel, has_bias=True, **arguments)
    made.load_weights(Experts.random(E, H, I, bias=True, seed=layer).named())
    return made


def tokens(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight tokens, most of which want experts 0 to 2 (which begin on one rank)."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    logits = torch.randn(8, E, generator=generator)
    logits[:, :3] += 2.0
    return torch.randn(8, H, generator=generator), logits


def check_balancing(use_async: bool, device: str = "cpu", tolerance: float = 1e-5) -> None:
    """Sixteen steps: before, while and after experts move the outputs are those of one rank."""
    groups, rank = make_groups(everyone())
    world = dist.get_world_size()
    alone = [build(i, None, device=device) for i in range(LAYERS)]
    redundant = {"enable_eplb": True, "num_redundant_experts": REDUNDANT}
    layers = [build(i, groups, device=device, **redundant) for i in range(LAYERS)]
    config = EPLBConfig(window_size=3, step_interval=4, use_async=use_async, planning_steps=2)
    balancer = ExpertBalancer(layers, groups.ep, config)
    assert balancer.logical_load().sum() == 0
    addresses = [t.data_ptr() for t in (balancer.logical_to_physical, balancer.replica_count)]
    weights = [layer.routed_experts.w13_weight.data_ptr() for layer in layers]
    start = balancer.physical_to_logical.clone()
    seen = []
    for step in range(16):
        for layer, whole in zip(layers, alone, strict=True):
            x, logits = (one.to(device) for one in tokens(rank, step))
            torch.testing.assert_close(
                layer(x, logits), whole(x, logits), rtol=tolerance, atol=tolerance
            )
        balancer.step()
        seen.append(balancer.is_rearranging)
    assert any(seen) == use_async
    placement = balancer.physical_to_logical
    assert not torch.equal(placement, start)
    assert addresses == [
        t.data_ptr() for t in (balancer.logical_to_physical, balancer.replica_count)
    ]
    assert weights == [layer.routed_experts.w13_weight.data_ptr() for layer in layers]
    everywhere = [torch.empty_like(placement) for _ in range(world)]
    dist.all_gather(everywhere, placement)
    assert all(torch.equal(other, placement) for other in everywhere)
    load = torch.zeros(1, E)
    for step in range(16):
        for other in range(world):
            picked = tokens(other, step)[1].topk(K).indices.flatten()
            load += torch.bincount(picked, minlength=E)
    load = load.expand(LAYERS, E)
    before = imbalance(rank_loads(load, start, world))
    after = imbalance(rank_loads(load, placement, world))
    # Two ranks begin almost even: nothing there is a third as uneven as before.
    assert after < max(1 + (before - 1) / 3, 1.05), (before, after)


def check_balancing_elsewhere(layout: Layout, mover: str | None) -> None:
    """As ``check_balancing``, however tokens reach the experts: also where ranks share them."""
    groups, token_rank = make_groups(layout)
    arguments: dict[str, Any] = {"enable_eplb": True, "num_redundant_experts": REDUNDANT}
    arguments |= {"is_sequence_parallel": layout.sp, "parallel": groups}
    layer = build(0, options=MoEOptions(prepare_finalize=mover), **arguments)
    alone = build(0, None)
    config = EPLBConfig(window_size=3, step_interval=4, planning_steps=2)
    balancer = ExpertBalancer([layer], groups.ep, config)
    start = balancer.physical_to_logical.clone()
    step = 0
    while not balancer.mover.is_moving:
        x, logits = tokens(token_rank, step)
        torch.testing.assert_close(layer(x, logits), alone(x, logits), rtol=1e-5, atol=1e-5)
        balancer.step()
        step += 1
    assert torch.equal(balancer.physical_to_logical, start)
    named = Experts.random(E, H, I, bias=True, seed=0).named()
    with pytest.raises(ValueError, match=r"experts are on their way: call the balancer's finish"):
        layer.load_weights(named)
    balancer.finish()
    layer.load_weights(named)
    assert not balancer.is_rearranging
    assert not torch.equal(balancer.physical_to_logical, start)
    torch.testing.assert_close(layer(x, logits), alone(x, logits), rtol=1e-5, atol=1e-5)


def hold_back_messages(mover: ExpertMover, cycles: int = 200_000_000) -> None:
    """From now on they leave a tenth of a second after ``start``, on a stream of their own."""
    start, wire = mover.start, torch.cuda.Stream()

    def later(source: Any, plan: Any) -> None:
        wire.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(wire):
            torch.cuda._sleep(cycles)
            start(source, plan)

    mover.start = later  # type: ignore[method-assign]


def check_balancing_beside_graphs(name: str | None, key: QuantKey | None) -> None:
    """Layers are captured once; replays run from beginning to end while experts are on their way,
    and no token is lost: the outputs stay those of one rank, up to the order of sums.

    ``name``: of the format of the weights; ``key``: of the rows."""
    world, rank = dist.get_world_size(), dist.get_rank()
    everyone, beside = dist.group.WORLD, dist.new_group()
    T, sizes, dtype = 64, (16, 2, 256, 128), torch.bfloat16
    layout = PeerLayout(world, T, sizes[2], sizes[1], dtype, key)
    scheme = None if name is None else OnlineQuantization.of(name, activation=key)
    tolerance = 2e-2 if key is None else 5e-2
    memory = PeerMemory(everyone, layout, timeout_s=20.0)
    groups = ParallelGroups(dp=everyone, ep=everyone, enable_expert_parallel=True, peers=memory)
    redundant = {"enable_eplb": True, "num_redundant_experts": 2 * world}
    spread = {"parallel": groups, "options": MoEOptions(prepare_finalize="peer")} | redundant
    layers, alone = [], []
    for index in range(LAYERS):
        weights = Experts.random(sizes[0], *sizes[2:], seed=index).named()
        for into, arguments in ((layers, spread), (alone, {})):
            layer = FusedMoE(*sizes, dtype, device="cuda", quant_config=scheme, **arguments)
            layer.load_weights(weights)
            into.append(layer)
    config = EPLBConfig(window_size=3, step_interval=4, planning_steps=2)
    balancer = ExpertBalancer(layers, everyone, config, transfer_group=beside)
    hold_back_messages(balancer.mover)
    start = balancer.physical_to_logical.clone()
    x = torch.empty(T, sizes[2], dtype=dtype, device="cuda")
    logits = torch.empty(T, sizes[0], device="cuda")

    def fill(step: int) -> None:
        generator = torch.Generator("cuda").manual_seed(100 * step + rank)
        x.normal_(generator=generator)
        logits.normal_(generator=generator)
        logits[:, 7:10] += 2.0  # which begin on one rank, once

    def forwards(these: list[Any], **known: Any) -> list[torch.Tensor]:
        return [layer(x, logits, **known) for layer in these]

    known = {"tokens_per_rank": [T] * world}
    fill(0)
    forwards(layers, **known)
    graph, found = record_graph(lambda: forwards(layers, **known), torch.cuda.Stream())
    beside_messages = 0
    for step in range(16):
        fill(step)
        graph.replay()
        torch.cuda.current_stream().synchronize()
        beside_messages += balancer.mover.is_sending
        for output, expected in zip(found, forwards(alone), strict=True):
            # Numbers between two of a format's may go to either: of the largest that is a share.
            size = 1.0 if key is None else max(float(expected.abs().amax()), 1.0)
            atol = tolerance * size
            torch.testing.assert_close(output, expected, rtol=tolerance, atol=atol)
        balancer.step()
    counted = torch.tensor(beside_messages)
    dist.all_reduce(counted)
    assert counted > 0
    assert not torch.equal(balancer.physical_to_logical, start)
    memory.check()
    memory.close()


def check_rearrange_now() -> None:
    groups, rank = make_groups(LAYOUT)
    layers = [build(0, groups, enable_eplb=True, num_redundant_experts=REDUNDANT)]
    config = EPLBConfig(window_size=100, step_interval=100)
    balancer = ExpertBalancer(layers, groups.ep, config)
    alone = build(0, None)
    for step in range(2):
        layers[0](*tokens(rank, step))
    assert balancer.logical_load().sum() == 2 * 4 * 8 * K
    before = balancer.balancedness()
    balancer.rearrange()
    assert balancer.logical_load().sum() == 0
    for step in range(2):
        x, logits = tokens(rank, step)
        torch.testing.assert_close(layers[0](x, logits), alone(x, logits), rtol=1e-5, atol=1e-5)
    assert balancer.balancedness() > before


def check_loading_anew() -> None:
    """New weights reach experts wherever balancing has put them; slots that it changed are not
    written by those who count as it was in the beginning."""
    groups, rank = make_groups(LAYOUT)
    redundant = {"enable_eplb": True, "num_redundant_experts": REDUNDANT}
    layer, x = build(0, groups, **redundant), tokens(rank, 0)
    balancer = ExpertBalancer([layer], groups.ep, EPLBConfig(window_size=100, step_interval=100))
    layer(*x)
    balancer.rearrange()
    placement = balancer.physical_to_logical[0].tolist()
    assert placement != [slot % E for slot in range(E + REDUNDANT)]
    other = Experts.random(E, H, I, bias=True, seed=7).named()
    layer.load_weights(other)
    torch.testing.assert_close(layer(*x), build(7)(*x), rtol=1e-5, atol=1e-5)
    experts = layer.routed_experts
    name, tensor = next(iter(other))
    assert name.startswith("experts.0.gate_proj")
    for row, slot in enumerate(experts.expert_local_to_global.tolist()):
        arguments = experts.w13_weight, tensor, name, "w1", slot
        if placement[slot] == slot % E:
            assert experts.weight_loader(*arguments, return_success=True)
            continue
        kept = experts.w13_weight[row].clone()
        with pytest.raises(ValueError, match=rf"another expert into slot {slot}"):
            experts.weight_loader(*arguments)
        assert torch.equal(experts.w13_weight[row], kept)


def check_another_default_device() -> None:
    """What ranks tell each other and plan is on the CPU, wherever new tensors are by default."""
    groups, rank = make_groups(LAYOUT)
    redundant = {"enable_eplb": True, "num_redundant_experts": REDUNDANT}
    with torch.device("meta"):
        layer = FusedMoE(E, K, H, I, torch.float32, parallel=groups, has_bias=True, **redundant)
    layer.to_empty(device="cpu")
    layer.load_weights(Experts.random(E, H, I, bias=True, seed=0).named())
    config = EPLBConfig(window_size=100, step_interval=100)
    with torch.device("meta"):
        balancer = ExpertBalancer([layer], groups.ep, config)
    start = balancer.physical_to_logical.clone()
    x, logits = tokens(rank, 0)
    expected = build(0)(x, logits)
    for _ in range(2):
        torch.testing.assert_close(layer(x, logits), expected, rtol=1e-5, atol=1e-5)
        with torch.device("meta"):
            balancer.rearrange()
    assert not torch.equal(balancer.physical_to_logical, start)


def check_all_dtypes_travel_together() -> None:
    """Weights, scales and codes of a made-up format, four slots per rank."""
    group, rank = make_groups(LAYOUT)[0].ep, dist.get_rank()
    before = [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 4, 5], [2, 2, 6, 7]]
    after = [[7, 1, 2, 7], [4, 0, 3, 5], [6, 6, 5, 4], [2, 0, 1, 3]]

    def rows(experts: list[int]) -> list[torch.Tensor]:
        base = torch.tensor(experts, dtype=torch.float32)[:, None]
        return [
            (base + torch.arange(6) / 8).to(torch.bfloat16),
            (base.expand(-1, 3) / 4).to(torch.float8_e4m3fn),
            base.expand(-1, 1).to(torch.uint8).contiguous(),
            base.expand(-1, 5).contiguous() * 3,
        ]

    mine = rows(before[rank])
    mover = ExpertMover(group, expert_bytes(mine), 4, torch.device("cpu"))
    for target, source in ((after, before), (before, after), (after, before)):
        plan = make_transfer_plan(source, target)
        mover.start(mine, plan)
        with pytest.raises(ValueError, match="still on its way"):
            mover.start(mine, plan)
        mover.commit(mine)
        for found, expected in zip(mine, rows(target[rank]), strict=True):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def check_quantized_while_serving(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Data and scales of a format go with their expert, between any two of sixteen forwards."""
    groups, rank = make_groups(everyone())
    sizes, scheme = (E, K, 128, 64, dtype), OnlineQuantization.of(name)
    spread = {"parallel": groups, "enable_eplb": True, "num_redundant_experts": REDUNDANT}
    alone, layers = [], []
    for index in range(2):
        for into, arguments in ((layers, spread), (alone, {})):
            layer = FusedMoE(*sizes, quant_config=scheme, **arguments)
            layer.load_weights(Experts.random(E, 128, 64, seed=index).named())
            into.append(layer)
    config = EPLBConfig(window_size=3, step_interval=4, planning_steps=2)
    balancer = ExpertBalancer(layers, groups.ep, config)
    placement, moving = balancer.physical_to_logical.clone(), 0
    for step in range(16):
        _, logits = tokens(rank, step)
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(rank)).to(dtype)
        for layer, whole in zip(layers, alone, strict=True):
            found, expected = layer(x, logits), whole(x, logits)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        moving += balancer.mover.is_moving
        balancer.step()
    assert moving >= 2
    assert (balancer.physical_to_logical != placement).any(dim=1).all()


def check_elastic(name: str | None) -> None:
    """Two ranks, then four, then two again: each holds what its new placement says, which may
    have copies of experts and any order; weights are quantized, or not (None)."""
    whole, rank = make_groups(LAYOUT)[0].ep, dist.get_rank()
    scheme = None if name is None else OnlineQuantization.of(name)
    small = build(0, make_groups(Layout(dp=2, ep=True))[0], quant_config=scheme)
    alone = build(0, None, quant_config=scheme)
    balanced = {"enable_eplb": True, "num_redundant_experts": REDUNDANT}
    large = build(1, make_groups(LAYOUT)[0], quant_config=scheme, **balanced)
    two = [list(range(6)), list(range(6, 12)), [], []]
    load = torch.arange(E)[None] ** 2
    placement = rebalance_experts(load, E + REDUNDANT, 4)
    four = placement.view(4, -1).tolist()
    assert four != [list(range(4 * r, 4 * r + 4)) for r in range(4)]
    source = small.routed_experts.get_expert_weights() if rank < 2 else []
    target = large.routed_experts.get_expert_weights()
    reshard_experts(source, target, make_transfer_plan(two, four), whole)
    large.routed_experts.process_weights_after_loading()
    ExpertBalancer([large], whole, physical_to_logical=placement)
    x, logits = tokens(rank, 0)
    torch.testing.assert_close(large(x, logits), alone(x, logits), rtol=1e-5, atol=1e-5)
    for row in source:
        row.view(torch.uint8).fill_(0x55)
    reshard_experts(target, source, make_transfer_plan(four, two), whole)
    if rank < 2:
        small.routed_experts.process_weights_after_loading()
        torch.testing.assert_close(small(x, logits), alone(x, logits), rtol=1e-5, atol=1e-5)


def check_refusals() -> None:
    groups, _ = make_groups(LAYOUT)
    balanced = build(0, groups, enable_eplb=True, num_redundant_experts=REDUNDANT)
    fewer = build(0, groups, enable_eplb=True)
    dealt = build(0, groups, enable_eplb=True, expert_placement="round_robin")
    sizes, given = (E, K, H, I + 2, torch.float32), {"has_bias": True, "enable_eplb": True}
    wider = FusedMoE(*sizes, parallel=groups, **given)
    uneven = build(0, groups, enable_eplb=True, num_redundant_experts=1)
    for layers, message in (
        ([], "at least one layer"),
        ([balanced, fewer], "layer 1 has 12 slots for 12 experts, layer 0 16"),
        ([uneven], "13 slots do not divide over 4 ranks"),
        ([build(0, None)], "layer 0 is rank 0 of 1"),
        ([dealt], "layer 0 is placed round_robin"),
        ([fewer, wider], "an expert of layer 1 has 864 bytes, of layer 0 656"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertBalancer(layers, groups.ep)
    with pytest.raises(ValueError, match="enable_eplb=False"):
        ExpertBalancer([build(0, groups)], groups.ep)
    odd, beside = dist.get_rank() == 1, dist.new_group()
    for message, layers, given in (
        (
            "transfer_group is False, True, False",
            [fewer],
            {"transfer_group": beside if odd else None},
        ),
        (
            "step_interval is 4, 5, 4",
            [fewer],
            {"config": EPLBConfig(window_size=1, step_interval=4 + odd)},
        ),
        ("layers is 1, 2, 1", [fewer] * (1 + odd), {}),
        (r"must be \(1, 12\), got \(12,\)", [fewer], {"physical_to_logical": torch.arange(E)}),
        ("at least one layer", [] if odd else [fewer], {}),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertBalancer(layers, groups.ep, **given)
    here, there = [[0], [1], [2], [3]], [[1], [0], [2], [3]]
    plans = [make_transfer_plan(here, after) for after in (here, there)]
    one, two = [torch.zeros(1, 4)], [torch.zeros(1, 8)]
    for message, (source, target, plan) in (
        ("plan is TransferPlan.*, TransferPlan", (one, one, plans[odd])),
        ("bytes of an expert is 16, 32, 16", (one, two if odd else one, plans[0])),
        ("neither experts before nor after", ([] if odd else one, [], plans[0])),
    ):
        with pytest.raises(ValueError, match=message):
            reshard_experts(source, target, plan, groups.ep)
    for wrong in ({"window_size": 0}, {"window_size": 9, "step_interval": 5}):
        with pytest.raises(ValueError, match="window_size"):
            EPLBConfig(**wrong)
