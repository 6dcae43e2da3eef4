"""No gradient flows through routed experts, and where one is asked for they run all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedmoe import FusedMoE, MoEOptions, fused_experts, quantize_layer

E, K, H, I = 6, 2, 64, 32  # noqa: E741


def layer_of(name: str | None = None, experts: str | None = None, **arguments):
    layer = FusedMoE(
        E, K, H, I, torch.float32, gate=nn.Linear(H, E), options=MoEOptions(experts=experts),
        **arguments,
    )  # fmt: skip
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    if name is not None:
        quantize_layer(layer, name)
    return layer


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        (None, None),
        (None, "torch"),
        (None, "grouped_mm"),
        ("int8", None),
        ("int4_g32", None),
        ("fp8_channel", None),
    ],
)
def test_rows_with_gradients_run_compiled_as_they_do_in_eager_code(name, experts):
    layer = layer_of(name, experts)
    x = torch.randn(5, H, requires_grad=True)
    with torch.no_grad():
        wanted = layer(x)
    for call in (layer, compiled(layer)):
        found = call(x)
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted)


def test_the_function_of_tensors_does_likewise():
    given = torch.randn(5, H), torch.randn(E, 2 * I, H) / 8, torch.randn(E, H, I) / 8
    for tensor in given:
        tensor.requires_grad_()
    picks = torch.full((5, K), 0.5, requires_grad=True), torch.randint(0, E, (5, K))
    with torch.no_grad():
        wanted = fused_experts(*given, *picks)
    for call in (fused_experts, compiled(fused_experts)):
        found = call(*given, *picks)
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("call", [lambda layer: layer, compiled])
def test_shared_experts_have_their_own(call):
    layer = layer_of(shared_experts=nn.Linear(H, H, bias=False))
    x = torch.randn(5, H, requires_grad=True)
    call(layer)(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.shared_experts.weight.sum(dim=0).expand(5, H))
