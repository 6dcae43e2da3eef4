"""The runner as a module: compiled, moved, copied, saved, loaded in parts, and its GPU habits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusedmoe import ApplyMoEActivationConfig, FusedMoE, MoEOptions
from layer_oracle import Experts, Rule, routed_oracle

E, K, H, I = 6, 2, 8, 12  # noqa: E741
EXPERTS = Experts.random(E, H, I)


def layer(**arguments):
    arguments = {"params_dtype": torch.float32, "options": MoEOptions(experts="torch")} | arguments
    runner = FusedMoE(E, K, H, I, **arguments)
    runner.load_weights(EXPERTS.named())
    return runner


def full_layer():
    """Everything that a forward can contain, on one rank."""
    bias = torch.rand(E + 2, generator=torch.Generator().manual_seed(0))
    return layer(
        gate=nn.Linear(H, E + 2, bias=False),
        shared_experts=nn.Linear(H, H),
        shared_expert_gate=nn.Linear(H, 1),
        routed_output_transform=nn.Linear(H, H),
        routed_scaling_factor=2.0,
        apply_routed_scale_to_output=True,
        zero_expert_type="identity",
        e_score_correction_bias=bias,
        router_logits_dtype=torch.float32,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_it_compiles_into_one_graph(dynamic):
    runner = full_layer()
    compiled = torch.compile(runner, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (4, 7, 1):
        x = torch.randn(T, H)
        torch.testing.assert_close(compiled(x), runner(x))


@torch.no_grad()
def test_it_compiles_before_it_ever_ran_and_with_a_workspace_limit():
    options = MoEOptions(experts="torch", max_workspace_bytes=1)
    runner = FusedMoE(E, K, H, I, torch.float32, options=options)
    for parameter in runner.routed_experts.parameters():
        nn.init.normal_(parameter)
    compiled = torch.compile(runner, fullgraph=True, backend="aot_eager")
    x, logits = torch.randn(4, H), torch.randn(4, E)
    torch.testing.assert_close(compiled(x, logits), runner(x, logits))


def test_the_op_of_compiled_code_passes_opcheck():
    import fusedmoe.experts.functional  # noqa: F401

    w1, w2 = torch.randn(3, 8, 4), torch.randn(3, 4, 4)
    rows = (torch.randn(2, 4), w1, w2, torch.rand(2, 2), torch.tensor([[0, 2], [1, -1]]))
    numbers = ApplyMoEActivationConfig().numbers()
    rest = ([None, None], "", None, "silu", False, -1, numbers, False, None, "torch", False)
    torch.library.opcheck(torch.ops.fusedmoe.fused_experts, (*rows, *rest))


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.bfloat16)])
def test_it_follows_its_weights(move):
    """A moved layer chooses its kernel anew; has_bias makes the kernel hold tensors."""
    experts = Experts.random(E, H, I, bias=True)
    runner = FusedMoE(E, K, H, I, torch.float32, has_bias=True, options=MoEOptions(experts="torch"))
    runner.load_weights(experts.named())
    x, logits = torch.randn(4, H), torch.randn(4, E)
    before = runner(x, logits)
    dtype = move(runner).routed_experts.w13_weight.dtype
    out = runner(x.to(dtype), logits)
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), before, rtol=3e-2, atol=3e-2)


def test_a_copy_is_independent():
    experts = Experts.random(E, H, I, bias=True)
    runner = FusedMoE(E, K, H, I, torch.float32, has_bias=True, options=MoEOptions(experts="torch"))
    runner.load_weights(experts.named())
    x, logits = torch.randn(4, H), torch.randn(4, E)
    before = runner(x, logits)
    twin = copy.deepcopy(runner)
    assert torch.equal(twin(x, logits), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(runner(x, logits), before)
    assert not twin(x, logits).any()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_restores_it_also_by_assignment(assign):
    """The biases a kernel holds are those of the layer even after they were replaced."""
    experts = Experts.random(E, H, I, bias=True)
    options = MoEOptions(experts="torch")
    runner = FusedMoE(E, K, H, I, torch.float32, has_bias=True, options=options)
    runner.load_weights(experts.named())
    other = FusedMoE(E, K, H, I, torch.float32, has_bias=True, options=options)
    for parameter in other.parameters():
        parameter.data.zero_()
    x, logits = torch.randn(4, H), torch.randn(4, E)
    assert not other(x, logits).any()
    other.load_state_dict(runner.state_dict(), assign=assign)
    assert torch.equal(other(x, logits), runner(x, logits))


def test_its_state_is_its_parts_and_nothing_else():
    assert sorted(full_layer().state_dict()) == [
        "gate.weight",
        "routed_experts.w13_weight",
        "routed_experts.w2_weight",
        "routed_output_transform.bias",
        "routed_output_transform.weight",
        "shared_expert_gate.bias",
        "shared_expert_gate.weight",
        "shared_experts.bias",
        "shared_experts.weight",
    ]


def test_its_parts_load_by_their_names():
    runner = layer(
        gate=nn.Linear(H, E, bias=False), shared_experts=nn.Linear(H, H), prefix="layers.0.mlp"
    )
    gate, shared = torch.randn(E, H), torch.randn(H, H)
    written = runner.load_weights(
        [
            ("layers.0.mlp.gate.weight", gate),
            ("layers.0.mlp.shared_experts.weight", shared),
            *((f"layers.0.mlp.{name}", tensor) for name, tensor in EXPERTS.named()),
        ]
    )
    assert written == {
        "gate.weight",
        "shared_experts.weight",
        "routed_experts.w13_weight",
        "routed_experts.w2_weight",
    }
    assert torch.equal(runner.gate.weight, gate)
    assert torch.equal(runner.shared_experts.weight, shared)
    for name, tensor, message in (
        ("gate.bias", gate, "gate has no parameter bias"),
        ("gate.weight", gate.T, r"expected shape \(6, 8\), found \(8, 6\)"),
        ("router.weight", gate, "router.weight names no tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.load_weights([(name, tensor)])


def test_weights_written_by_hand_are_prepacked_when_asked():
    class Prepacking:
        packed = 0

    runner = layer()
    built = runner.routed_experts.quant_method.kernel(runner.routed_experts).experts
    built.process_weights_after_loading = lambda weights: setattr(
        Prepacking, "packed", Prepacking.packed + 1
    )
    x, logits = torch.randn(4, H), torch.randn(4, E)
    runner(x, logits)
    assert Prepacking.packed == 0
    runner.routed_experts.process_weights_after_loading()
    assert Prepacking.packed == 1
    runner.load_weights(EXPERTS.named()[:1])
    runner(x, logits)
    assert Prepacking.packed == 2
    runner.cpu()(x, logits)
    assert Prepacking.packed == 3


def test_it_prints_what_it_is():
    text = repr(layer())
    assert "experts=6/6, hidden=8, intermediate=12, activation=silu" in text


def gpu_layer(**arguments):
    experts = Experts.random(8, 128, 256, dtype=torch.bfloat16)
    runner = FusedMoE(
        8, 2, 128, 256, torch.bfloat16, device="cuda", gate=nn.Linear(128, 8).cuda(), **arguments
    )
    runner.load_weights(experts.named())
    return runner, experts


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("T", [0, 1, 7, 300])
def test_gpu_layer_is_the_loop_without_waiting_for_the_device(T):
    runner, experts = gpu_layer()
    x = torch.randn(T, 128, device="cuda", dtype=torch.bfloat16)
    runner(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = runner(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logits = runner.gate(x.float()).cpu()
    expected = routed_oracle(x.cpu(), logits, experts, Rule(2))
    torch.testing.assert_close(out.cpu().double(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_layer_in_a_cuda_graph():
    runner, _ = gpu_layer()
    x = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    runner(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = runner(x)
    for _ in range(3):
        x.normal_()
        captured.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(captured, runner(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_layer_compiled():
    runner, _ = gpu_layer(
        shared_experts=nn.Linear(128, 128).cuda().bfloat16(),
        shared_expert_gate=nn.Linear(128, 1).cuda().bfloat16(),
    )
    compiled = torch.compile(runner, fullgraph=True)
    for T in (1, 16, 300):
        x = torch.randn(T, 128, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), runner(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_layer_moved_from_the_cpu():
    experts = Experts.random(E, H * 16, I * 16, dtype=torch.bfloat16)
    runner = FusedMoE(E, K, H * 16, I * 16, torch.bfloat16)
    runner.load_weights(experts.named())
    x, logits = torch.randn(5, H * 16, dtype=torch.bfloat16), torch.randn(5, E)
    before = runner(x, logits)
    after = runner.cuda()(x.cuda(), logits.cuda())
    torch.testing.assert_close(after.cpu(), before, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("debug", [False, True])
def test_gpu_ids_out_of_range_count_as_nothing_or_raise_on_request(debug):
    from fusedmoe.config import RoutingMethodType
    from fusedmoe.router.base import FusedMoERouter
    from fusedmoe.router.spec import RoutingResult

    class Stray(FusedMoERouter):
        routing_method_type = RoutingMethodType.Custom

        def select_experts(self, hidden_states, router_logits, dtype=None, **rows):
            ids = torch.tensor([[0, 8], [-7, 1], [2**31 - 1, 2]], device="cuda")
            return RoutingResult(
                torch.full((3, 2), 0.5, device="cuda"), ids.to(dtype or torch.int32)
            )

    experts = Experts.random(8, 128, 256, dtype=torch.bfloat16)
    runner = FusedMoE(
        8,
        2,
        128,
        256,
        torch.bfloat16,
        device="cuda",
        router=Stray(),
        options=MoEOptions(debug_checks=debug),
    )
    runner.load_weights(experts.named())
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    logits = torch.zeros(3, 8, device="cuda")
    if debug:
        with pytest.raises(ValueError, match=r"\[-7, 2147483647\], not in \[-1, 8\)"):
            runner(x, logits)
        return
    out = runner(x, logits).cpu().double()
    for t, e in enumerate((0, 1, 2)):
        expected = 0.5 * experts.run(e, x[t].cpu().double())
        torch.testing.assert_close(out[t], expected, rtol=3e-2, atol=3e-2)
