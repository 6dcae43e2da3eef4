"""Routing of many picks on Hopper: by its own kernel, the same bits in any batch."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.kernels.cuda import routing_warp
from fusedmoe.kernels.routing import PICKS_IN_TURN, routing_reference
from fusedmoe.router.functional import route
from fusedmoe.router.spec import RoutingSpec, RoutingTensors
from gpu_marks import needs_hopper, needs_nvrtc

pytestmark = [pytest.mark.gpu, needs_hopper, needs_nvrtc]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("E", "K"), [(384, 8), (256, 6), (128, 8), (512, 10), (60, 4)])
def test_route(E, K, score, monkeypatch):
    launch, launched = routing_warp.routing_warp, []

    def seen(*args, **kwargs):
        launched.append(args)
        return launch(*args, **kwargs)

    monkeypatch.setattr(routing_warp, "routing_warp", seen)
    torch.manual_seed(E)
    logits = torch.randn(5000, E, device="cuda").bfloat16()
    logits[7], logits[8, 3] = 0.5, float("nan")
    bias = torch.randn(E, device="cuda") if score == "sigmoid" else None
    tensors = RoutingTensors(correction_bias=bias)
    spec = RoutingSpec(top_k=K, num_experts=E, score_function=score, renormalize=True)
    result = route(logits, spec, tensors)
    assert len(launched) == (K > PICKS_IN_TURN)
    expected = routing_reference(logits, spec, tensors)
    assert torch.equal(result.topk_ids, expected.topk_ids)
    torch.testing.assert_close(result.topk_weights, expected.topk_weights, rtol=1e-5, atol=1e-6)
    for tokens in (1, 8, 9):
        few = route(logits[:tokens], spec, tensors)
        assert few.topk_weights.equal(result.topk_weights[:tokens])


def test_captured_before_it_has_run():
    spec = RoutingSpec(top_k=7, num_experts=101, renormalize=True)
    logits = torch.randn(3, 101, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = route(logits, spec)
    graph.replay()
    assert torch.equal(result.topk_ids, routing_reference(logits, spec, RoutingTensors()).topk_ids)
