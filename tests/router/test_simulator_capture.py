"""Routing by chance, and the record of what was routed."""

import pytest
import torch

from fusedmoe.config import RoutingMethodType
from fusedmoe.router.capture import RoutedExpertsCapturer
from fusedmoe.router.factory import create_fused_moe_router
from fusedmoe.router.simulator import (
    NormalRouting,
    RoutingSimulator,
    RoutingStrategy,
    SimulatedRouter,
)

T, E, K = 4000, 16, 4


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(T, 3), torch.randn(T, E)


def test_uniform_random_spreads_without_duplicates(x):
    weights, ids = RoutingSimulator.simulate_routing(*x, "uniform_random", K)
    assert ids.dtype is torch.int64
    assert (weights == 1).all()
    assert all(len(set(row)) == K for row in ids[:50].tolist())
    share = torch.bincount(ids.flatten(), minlength=E) / (T * K)
    assert (share - 1 / E).abs().max() < 0.02


def test_normal_routing_is_a_bell_over_the_experts(x):
    weights, ids = NormalRouting(std=0.5).route_tokens(*x, K, torch.int32)
    assert ids.dtype is torch.int32
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(T))
    count = torch.bincount(ids.flatten(), minlength=E)
    assert count[E // 2 - 1 : E // 2 + 1].min() > 10 * count[[1, E - 2]].max()
    far = NormalRouting(mean=60.0).route_tokens(*x, K)[1]
    assert (far == E - 1).all()


def test_a_strategy_of_ones_own(x):
    class LastExpert(RoutingStrategy):
        def route_tokens(self, hidden_states, router_logits, top_k, indices_type=None):
            shape = (len(router_logits), top_k)
            ids = torch.full(shape, router_logits.shape[1] - 1, dtype=indices_type)
            return torch.ones(shape), ids

    RoutingSimulator.register_strategy("last", LastExpert())
    try:
        assert "last" in RoutingSimulator.get_available_strategies()
        _, ids = RoutingSimulator.simulate_routing(*x, "last", 2, torch.int32)
        assert (ids == E - 1).all()
    finally:
        RoutingSimulator._strategies.pop("last")
    with pytest.raises(ValueError, match=r"'last'.*normal_routing"):
        RoutingSimulator.simulate_routing(*x, "last", 2)


def test_a_simulated_router_keeps_what_surrounds_the_rule(x):
    """The picks, the shared experts, padding, the hook and the load balancing of the router."""
    router = create_fused_moe_router(
        K,
        12,
        renormalize=False,
        e_score_correction_bias=torch.zeros(E),
        zero_expert_type="identity",
        num_fused_shared_experts=1,
        shared_expert_weight=0.25,
    )
    seen = []
    router.set_capture_fn(seen.append)
    load = torch.zeros(13, dtype=torch.int32)
    router.set_eplb_state(
        load, torch.arange(13).flip(0)[:, None], torch.ones(13, dtype=torch.int16)
    )
    simulated = SimulatedRouter(router, "uniform_random")
    assert simulated.routing_method_type is RoutingMethodType.Simulated
    padding = torch.zeros(T, dtype=torch.bool)
    padding[5] = True
    weights, ids = simulated.select_experts(*x, is_padding=padding)
    assert ids.dtype is torch.int32
    assert ids.shape == (T, K + 1)
    assert ids[5].tolist() == [-1] * (K + 1)
    assert weights[5].tolist() == [0] * (K + 1)
    assert weights[0].tolist() == [1, 1, 1, 1, 0.25]
    assert seen[0][:, :K].max() == 11
    assert torch.equal(ids[0], 12 - seen[0][0])
    assert load.sum() == (T - 1) * (K + 1)


@pytest.mark.parametrize("strategy", ["uniform_random", "normal_routing"])
def test_impossible_picks_are_refused(x, strategy):
    with pytest.raises(ValueError, match="top_k 17"):
        RoutingSimulator.simulate_routing(*x, strategy, 17)


def test_capturer_keeps_layers_and_tokens_apart():
    capturer = RoutedExpertsCapturer(8, 3, 2, 200, "cpu")
    ids = torch.randint(0, 200, (3, 5, 2), dtype=torch.int64)
    for layer in range(3):
        capturer.hook(layer)(ids[layer])
    snapshot = capturer.snapshot(5)
    assert snapshot.dtype is torch.uint8
    assert torch.equal(snapshot.long(), ids.transpose(0, 1))
    assert (capturer.device_ids[5:] == -1).all()
    capturer.clear()
    assert (capturer.device_ids == -1).all()
    assert capturer.snapshot(2).unique().tolist() == [255]


def test_capturer_keeps_the_local_rows_of_a_gathered_batch():
    """Also without the fused shared experts behind the routed slots."""
    capturer = RoutedExpertsCapturer(4, 1, 2, 8, "cpu")
    gathered = torch.arange(24, dtype=torch.int32).view(8, 3) % 8
    capturer.hook(0, rows=slice(4, 8))(gathered)
    assert torch.equal(capturer.snapshot(4)[:, 0].int(), gathered[4:, :2])


@pytest.mark.parametrize(
    ("num_experts", "empty_slots", "dtype"),
    [
        (256, False, torch.uint8),
        (256, True, torch.uint16),
        (257, False, torch.uint16),
        (65536, False, torch.uint16),
    ],
)
def test_snapshot_dtype(num_experts, empty_slots, dtype):
    capturer = RoutedExpertsCapturer(1, 1, 1, num_experts, "cpu", empty_slots=empty_slots)
    capturer.capture(0, torch.tensor([[num_experts - 1]]))
    assert capturer.snapshot(1).dtype is dtype
    assert capturer.snapshot(1).to(torch.int64).item() == num_experts - 1


def test_an_empty_slot_is_never_mistaken_for_an_expert():
    with pytest.raises(ValueError, match="empty_slots=True"):
        RoutedExpertsCapturer(1, 1, 1, 256, "cpu").snapshot(1)
    wide = RoutedExpertsCapturer(1, 1, 1, 256, "cpu", empty_slots=True)
    assert wide.snapshot(1).to(torch.int64).item() == 65535


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.hook(3), "layer 3"),
        (lambda c: c.capture(0, torch.zeros(9, 2)), r"\(9, 2\)"),
        (lambda c: c.capture(0, torch.zeros(2, 1)), r"\(2, 1\)"),
        (lambda c: c.snapshot(9), "num_tokens 9"),
        (lambda c: RoutedExpertsCapturer(1, 1, 1, 65537, "cpu"), "65537"),
    ],
)
def test_capturer_names_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(RoutedExpertsCapturer(8, 3, 2, 16, "cpu"))


@pytest.mark.gpu
def test_captures_sit_in_a_graph():
    router = create_fused_moe_router(2, E)
    capturer = RoutedExpertsCapturer(8, 1, 2, E, "cuda")
    router.set_capture_fn(capturer.hook(0))
    hidden, logits = torch.randn(5, 3, device="cuda"), torch.randn(5, E, device="cuda")
    router.select_experts(hidden, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        router.select_experts(hidden, logits)
    logits.normal_()
    graph.replay()
    expected = logits.topk(2, dim=1).indices.cpu()
    assert torch.equal(capturer.snapshot(5)[:, 0].long(), expected)
