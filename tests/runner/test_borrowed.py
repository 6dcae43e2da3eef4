"""The router's tensors that a gate owns stay the gate's, whatever happens to the layer."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from fusedmoe import FusedMoE, RoutingSpec, RoutingTensors, SpecRouter

E, K, H, I = 8, 2, 16, 32  # noqa: E741
FIRST, LAST = torch.tensor([9.0, 0, 0, 0, 0, 0, 9, 0]), torch.tensor([0.0, 9, 0, 9, 0, 0, 0, 0])


class Gate(nn.Module):
    """As engines write it: the correction bias is a Parameter, or a buffer, of the gate."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E, H))
        bias = torch.zeros(E)
        if kind == "parameter":
            self.bias = nn.Parameter(bias, requires_grad=False)
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def layer_with(gate: Gate | None, bias: torch.Tensor) -> nn.Module:
    return FusedMoE(
        *(E, K, H, I, torch.float32),
        gate=gate,
        scoring_func="sigmoid",
        e_score_correction_bias=bias,
    )


def state() -> dict[str, torch.Tensor]:
    gate = Gate("parameter")
    full = dict(layer_with(gate, gate.bias).state_dict())
    return {name: torch.zeros_like(t) for name, t in full.items()} | {"gate.bias": FIRST.clone()}


def chosen(layer: nn.Module) -> set[int]:
    """Experts that the layer routes to, which its bias alone decides; a forward must pass, too."""
    x = torch.randn(3, H, dtype=layer.gate.weight.dtype)
    assert layer(x).isfinite().all()
    return set(layer.router.select_experts(x, layer.gate(x))[1].flatten().tolist())


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
@pytest.mark.parametrize("how", ["emptied", "assigned", "cast", "copied"])
def test_a_bias_is_loaded_into_the_gate_and_read_by_the_router(how: str, kind: str) -> None:
    with torch.device("meta" if how in ("emptied", "assigned") else "cpu"):
        gate = Gate(kind)
        layer = layer_with(gate, gate.bias)
    if how == "emptied":
        layer.to_empty(device="cpu")
    elif how == "cast":
        layer.to(torch.float64).to(torch.float32)
    elif how == "copied":
        layer = copy.deepcopy(layer)
    layer.load_state_dict(state(), assign=how == "assigned")
    assert chosen(layer) == {0, 6}
    assert layer.router.correction_bias is layer.gate.bias
    layer.load_weights({"gate.bias": LAST})
    assert chosen(layer) == {1, 3}
    layer.load_state_dict(state(), assign=True)
    assert chosen(layer) == {0, 6}


def test_a_model_that_holds_the_layer_is_loaded_likewise() -> None:
    with torch.device("meta"):
        gate = Gate("buffer")
        model = nn.Sequential(layer_with(gate, gate.bias))
    model.to_empty(device="cpu")
    model.load_state_dict({f"0.{name}": tensor for name, tensor in state().items()})
    assert chosen(model[0]) == {0, 6}


@torch.no_grad()
def test_a_compiled_layer_reads_the_bias_that_was_assigned() -> None:
    gate = Gate("parameter")
    layer = layer_with(gate, gate.bias)
    layer.load_state_dict(state())
    torch.nn.init.normal_(layer.routed_experts.w13_weight)
    torch.nn.init.normal_(layer.routed_experts.w2_weight)
    x = torch.randn(3, H)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    before = layer(x)
    layer.load_state_dict(layer.state_dict() | {"gate.bias": LAST.clone()}, assign=True)
    assert not torch.allclose(layer(x), before)
    torch.testing.assert_close(compiled(x), layer(x))


def test_memory_that_nothing_fills_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        gate = Gate("parameter")
        layer = layer_with(None, gate.bias)
    with caplog.at_level(logging.WARNING):
        layer.to_empty(device="cpu")
    assert "correction_bias has memory without values" in caplog.text
    layer.router.correction_bias = nn.Parameter(FIRST, requires_grad=False)
    caplog.clear()
    layer.to(torch.float64)
    assert not caplog.text


def test_a_router_of_the_callers_is_renewed_too() -> None:
    gate = Gate("buffer")
    rule = RoutingSpec(top_k=K, num_experts=E, score_function="sigmoid")
    router = SpecRouter(rule, RoutingTensors(correction_bias=gate.bias))
    layer = FusedMoE(E, K, H, I, torch.float32, gate=gate, router=router).to(torch.float64)
    assert layer.router.correction_bias is layer.gate.bias
