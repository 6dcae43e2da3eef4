"""What the GPU tests of two implementations of the experts ask of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from expert_layers import Layer

GPU = Layer(device="cuda", dtype=torch.bfloat16, T=33, K=4, E=16, H=256, I=192)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}

Tensors = dict[str, Any]
Run = Callable[[Layer, Tensors], torch.Tensor]


def assert_right(out: torch.Tensor, layer: Layer, tensors: Tensors) -> None:
    """Against the definition in fp64, as a part of its largest number."""
    expected = layer.expected(tensors)
    scale = expected.abs().max().clamp(min=1e-6)
    error = (out.double() - expected).abs().max() / scale
    assert error < TOLERANCE[layer.dtype], float(error)


def assert_replays_follow_new_routing(run: Run, T: int) -> None:
    """Captured once, without synchronising, it gives what a run gives on whatever comes later."""
    layer = replace(GPU, T=T, E=32, local=20)
    tensors = layer.tensors()
    run(layer, tensors)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, tensors)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(layer, tensors)
    for seed in (1, 2):
        other = replace(layer, seed=seed).tensors()
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            tensors[name].copy_(other[name])
        out.fill_(float("nan"))
        graph.replay()
        assert out.equal(run(layer, tensors))
        assert_right(out, layer, tensors)


def compiled_apply(experts: Any, layer: Layer, tensors: Tensors) -> torch.Tensor:
    """``experts.apply`` on ``tensors`` without a graph break; its layer has all experts here."""
    sizes = (layer.T, 2 * layer.I, layer.H, layer.K, layer.E, layer.E)
    shapes = experts.workspace_shapes(*sizes, None, layer.activation)

    def apply(
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        first, second, out = (x.new_empty(shape) for shape in shapes)
        experts.apply(
            *(out, x, w1, w2, weights, ids, layer.activation, layer.E, None, None, None),
            *(first, second, None, False),
        )
        return out

    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    return torch.compile(apply, fullgraph=True)(*(tensors[n] for n in names))


def rows_past_two_to_the_31() -> tuple[Layer, Tensors, torch.Tensor, Tensors]:
    """R * H is 2^31 + 2^22: slots at the end have addresses that 32 bits do not hold.

    A layer and its tensors, some of the rows, and the tensors of these alone.
    """
    layer = replace(GPU, T=1, K=2, E=2, H=2048, I=32)
    T = (2**31 + 2**22) // (2 * 2048)
    tensors = layer.tensors()
    sample = torch.tensor([0, 1, T // 2, T - 2, T - 1], device="cuda")
    tensors["hidden_states"] = torch.randn(T, 2048, device="cuda", dtype=torch.bfloat16)
    tensors["topk_ids"] = torch.randint(0, 2, (T, 2), device="cuda", dtype=torch.int32)
    tensors["topk_weights"] = torch.rand(T, 2, device="cuda")
    part = {n: tensors[n][sample] for n in ("hidden_states", "topk_weights", "topk_ids")}
    return replace(layer, T=T), tensors, sample, tensors | part


def weights_past_two_to_the_31() -> tuple[Layer, Tensors]:
    """The last of 9 experts begins past 2^31 elements; the others are zero."""
    e, H = 9, 16384
    layer = replace(GPU, T=2, K=1, E=e, H=H, I=H // 2)
    w1 = torch.zeros(e, H, H, device="cuda", dtype=torch.bfloat16)
    w2 = torch.zeros(e, H, H // 2, device="cuda", dtype=torch.bfloat16)
    w1[8].normal_(std=H**-0.5)
    w2[8].normal_(std=H**-0.5)
    return layer, {
        "hidden_states": torch.randn(2, H, device="cuda", dtype=torch.bfloat16),
        "w1": w1,
        "w2": w2,
        "topk_weights": torch.ones(2, 1, device="cuda"),
        "topk_ids": torch.tensor([[8], [0]], device="cuda"),
        "w1_bias": None,
        "w2_bias": None,
        "expert_map": None,
    }
