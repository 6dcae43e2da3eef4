"""Shared experts run exactly once, at the moment their order says, and never change the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedmoe import FusedMoE, MoEOptions
from fusedmoe.runner.shared_experts import SharedExpertsOrder, SharedExpertsRun, choose_order

ORDERS = SharedExpertsOrder


@pytest.mark.parametrize(
    ("facts", "order"),
    [
        ({}, ORDERS.MULTI_STREAM_OVERLAPPED),
        ({"num_tokens": 256}, ORDERS.MULTI_STREAM_OVERLAPPED),
        ({"num_tokens": 257}, ORDERS.NO_OVERLAP),
        ({"num_tokens": 0}, ORDERS.NO_OVERLAP),
        ({"token_limit": 0}, ORDERS.NO_OVERLAP),
        ({"on_cuda": False}, ORDERS.NO_OVERLAP),
        ({"one_stream": True}, ORDERS.NO_OVERLAP),
        ({"combine_is_async": True}, ORDERS.MK_INTERNAL_OVERLAPPED),
        ({"combine_is_async": True, "on_cuda": False}, ORDERS.MK_INTERNAL_OVERLAPPED),
        ({"combine_is_async": True, "launches_the_wire": True}, ORDERS.MULTI_STREAM_OVERLAPPED),
        (
            {"combine_is_async": True, "launches_the_wire": True, "num_tokens": 257},
            ORDERS.MK_INTERNAL_OVERLAPPED,
        ),
    ],
)
def test_the_order_is_a_pure_function(facts, order):
    facts = {
        "on_cuda": True,
        "num_tokens": 4,
        "token_limit": 256,
        "combine_is_async": False,
    } | facts
    assert choose_order(**facts) is order


@pytest.mark.parametrize("order", [ORDERS.NO_OVERLAP, ORDERS.MK_INTERNAL_OVERLAPPED])
@pytest.mark.parametrize("called", [True, False])
def test_it_is_computed_once_when_its_order_says(order, called):
    """A kernel without an async combine never calls it; the output is there all the same."""
    log = []

    def compute(x):
        log.append("computed")
        return x + 1

    x = torch.zeros(2)
    run = SharedExpertsRun(compute, x, order)
    run.start()
    log.append("routed")
    if called:
        run(x)
    log.append("combined")
    assert (run.output() == 1).all()
    early = order is ORDERS.NO_OVERLAP
    position = 0 if early else 1 if called else 2
    assert log.index("computed") == position
    assert log.count("computed") == 1


def gpu_layer(limit: int, **arguments):
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64)).cuda().bfloat16()
    layer = FusedMoE(
        8,
        2,
        64,
        128,
        torch.bfloat16,
        device="cuda",
        shared_experts=shared,
        shared_expert_gate=nn.Linear(64, 1).cuda().bfloat16(),
        runner_args={"shared_overlap_token_limit": limit},
        **arguments,
    )
    for parameter in layer.routed_experts.parameters():
        nn.init.normal_(parameter, std=0.05)
    layer.routed_experts.process_weights_after_loading()
    return layer


@pytest.mark.gpu
@torch.no_grad()
def test_the_second_stream_changes_nothing_however_often_it_runs():
    apart, beside = gpu_layer(0), gpu_layer(256)
    beside.load_state_dict(apart.state_dict())
    for step in range(50):
        x = torch.randn(17, 64, device="cuda", dtype=torch.bfloat16)
        logits = torch.randn(17, 8, device="cuda")
        expected = apart(x, logits)
        results = [beside(x.clone(), logits) for _ in range(4)]
        garbage = [torch.full_like(x, float("nan")) for _ in range(8)]
        assert all(torch.equal(result, expected) for result in results), step
        del garbage


@pytest.mark.gpu
@torch.no_grad()
def test_the_second_stream_is_captured_with_the_layer():
    if (
        gpu_layer(256).routed_experts.quant_method.select(gpu_layer(256).routed_experts).chosen.name
        == "torch"
    ):
        pytest.skip("torch experts read ids on the host")
    layer = gpu_layer(256)
    x = torch.randn(17, 64, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(17, 8, device="cuda")
    for _ in range(2):
        layer(x, logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x, logits)
    for _ in range(3):
        x.normal_()
        logits.normal_()
        captured.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(captured, layer(x, logits), rtol=2e-2, atol=2e-2)


def test_the_cpu_layer_adds_them():
    layer = FusedMoE(
        2, 1, 4, 4, torch.float32, shared_experts=nn.Identity(), options=MoEOptions(experts="torch")
    )
    for parameter in layer.routed_experts.parameters():
        parameter.data.zero_()
    x = torch.randn(3, 4)
    assert torch.equal(layer(x, torch.randn(3, 2)), x)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"shared_experts": nn.Linear(4, 1)}, r"give \(3, 1\), the routed ones \(3, 4\)"),
        (
            {"shared_experts": nn.Identity(), "shared_expert_gate": nn.Linear(4, 3)},
            r"shared_expert_gate gives \(3, 3\) for an output of \(3, 4\)",
        ),
    ],
)
def test_outputs_that_torch_would_stretch_or_that_do_not_fit_are_refused(parts, message):
    layer = FusedMoE(2, 1, 4, 4, torch.float32, **parts)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(3, 4), torch.randn(3, 2))
