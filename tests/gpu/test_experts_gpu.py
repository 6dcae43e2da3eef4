"""The Triton experts on a GPU: every dtype, graphs, compilation, no synchronisation, 2^31."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe import BatchedTritonExperts, MoEOptions, fused_experts
from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.grouped_mm import GroupedMMExperts
from fusedmoe.experts.triton import TritonExperts
from fusedmoe.prepare_finalize.batched import BatchedPrepareAndFinalize
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.config import biased_moe_quant_config

pytestmark = pytest.mark.gpu
NAN = float("nan")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
GPU = Layer(device="cuda", dtype=torch.bfloat16, T=33, K=4, E=16, H=256, I=192)
LAYERS = {
    "one_token": replace(GPU, T=1),
    "lone_slots": replace(GPU, T=4, E=64, bias=True),
    "lone_slots_of_few_experts_here": replace(GPU, T=2, E=128, local=40),
    "decode": replace(GPU, T=16, K=8, E=64),
    "a_block_each": replace(GPU, T=64),
    "tall_blocks": replace(GPU, T=512, K=2, E=8),
    "widest_tiles": replace(GPU, T=2048, K=2, E=4),
    "odd_sizes": replace(GPU, H=250, I=99, T=77),
    "every_expert": replace(GPU, K=16, T=9),
    "bias": replace(GPU, bias=True),
    "expert_map": replace(GPU, E=32, local=5, T=300),
    "no_gate": replace(GPU, activation=MoEActivation.RELU2_NO_MUL, T=600),
    "interleaved": replace(GPU, activation=MoEActivation.SWIGLUOAI, bias=True, T=1000),
    "gelu_tanh": replace(GPU, activation=MoEActivation.GELU_TANH),
    "clamped": replace(GPU, numbers=ApplyMoEActivationConfig(clamp_limit=0.5)),
    "weight_on_input": replace(GPU, K=1, weight_on_input=True),
    "batch_invariant": replace(GPU, T=200, options=MoEOptions(batch_invariant=True)),
    "passes": replace(GPU, T=200, options=MoEOptions(max_workspace_bytes=100_000)),
}
CHOSEN = MoEOptions(experts="triton")


def call(layer, tensors, function=fused_experts, **changes):
    arguments = {
        "activation": layer.activation,
        "apply_router_weight_on_input": layer.weight_on_input,
        "quant_config": biased_moe_quant_config(tensors["w1_bias"], tensors["w2_bias"]),
        "activation_config": layer.numbers,
        "options": replace(layer.options, experts="triton"),
    }
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids", "expert_map")
    return function(**{n: tensors[n] for n in names}, **(arguments | changes))


def assert_right(out, layer, tensors):
    expected = layer.expected(tensors)
    scale = expected.abs().max().clamp(min=1e-6)
    error = (out.double() - expected).abs().max() / scale
    assert error < TOLERANCE[layer.dtype], float(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype):
    layer = replace(LAYERS[name], dtype=dtype)
    tensors = layer.tensors()
    assert_right(call(layer, tensors), layer, tensors)
    mover = MoEPrepareAndFinalizeNoDPEPModular()
    assert layer.run(TritonExperts, mover, tensors).equal(call(layer, tensors))


@pytest.mark.parametrize("name", LAYERS)
def test_batched_and_grouped_mm_layers(name):
    layer = replace(LAYERS[name], options=MoEOptions())
    tensors = layer.tensors()
    mover = BatchedPrepareAndFinalize(layer.T + 3, layer.local or layer.E)
    assert_right(layer.run(BatchedTritonExperts, mover, tensors), layer, tensors)
    if layer.H % 8 == 0:
        mover = MoEPrepareAndFinalizeNoDPEPModular()
        assert_right(layer.run(GroupedMMExperts, mover, tensors), layer, tensors)


@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.SWIGLUOAI])
@pytest.mark.parametrize("T", [3, 100, 3000])
def test_transposed_weights(activation, T):
    layer = replace(GPU, activation=activation, T=T)
    tensors = layer.tensors()
    for name in ("w1", "w2"):
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(call(layer, tensors), layer, tensors)


@pytest.mark.parametrize("T", [4, 100, 2000])
def test_dead_ids_and_nan_rows(T):
    layer = replace(GPU, T=T)
    tensors = layer.tensors()
    ids = tensors["topk_ids"]
    ids[0], ids[1, 0], ids[1, 1], ids[2, 2] = -1, 16, 2**31 - 1, -5
    out = call(layer, tensors)
    assert (out[0] == 0).all()
    assert_right(out, layer, tensors)
    tensors["hidden_states"][3] = NAN
    again = call(layer, tensors)
    assert again[3].isnan().all()
    assert torch.cat([again[:3], again[4:]]).equal(torch.cat([out[:3], out[4:]]))
    with pytest.raises(ValueError, match="2147483647"):
        call(layer, tensors, options=replace(CHOSEN, debug_checks=True))


@pytest.mark.parametrize("T", [1, 64, 1500])
def test_graph_replay_follows_new_routing_without_synchronising(T):
    layer = replace(GPU, T=T, E=32, local=20)
    tensors = layer.tensors()
    call(layer, tensors)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(layer, tensors)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(layer, tensors)
    for seed in (1, 2):
        other = replace(layer, seed=seed).tensors()
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            tensors[name].copy_(other[name])
        out.fill_(NAN)
        graph.replay()
        assert out.equal(call(layer, tensors))
        assert_right(out, layer, tensors)


def test_every_run_gives_the_same_bits():
    layer = replace(GPU, T=3000, K=8, E=64)
    tensors = layer.tensors()
    first = call(layer, tensors)
    assert all(call(layer, tensors).equal(first) for _ in range(5))


def test_batch_invariance_is_bitwise():
    layer = replace(GPU, T=700, options=MoEOptions(batch_invariant=True), bias=True)
    tensors = layer.tensors()
    whole = call(layer, tensors)
    for rows in (slice(0, 1), slice(5, 7), slice(100, 133), slice(300, 700)):
        part = {n: tensors[n][rows] for n in ("hidden_states", "topk_weights", "topk_ids")}
        assert call(layer, tensors | part).equal(whole[rows])


@pytest.mark.parametrize("T", [2, 200])
def test_compiled_without_graph_breaks(T):
    layer = replace(GPU, T=T, bias=True)
    tensors = layer.tensors()
    expected = call(layer, tensors)
    assert call(layer, tensors, torch.compile(fused_experts, fullgraph=True)).equal(expected)
    experts = TritonExperts(
        layer.config(), biased_moe_quant_config(tensors["w1_bias"], tensors["w2_bias"])
    )
    shapes = experts.workspace_shapes(T, 384, 256, 4, 16, 16, None, layer.activation)

    def apply(x, w1, w2, weights, ids):
        first, second, out = (x.new_empty(shape) for shape in shapes)
        act = layer.activation
        experts.apply(
            out, x, w1, w2, weights, ids, act, 16, None, None, None, first, second, None, False
        )
        return out

    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    compiled = torch.compile(apply, fullgraph=True)
    assert compiled(*(tensors[n] for n in names)).equal(expected)


@pytest.mark.parametrize("name", ["one_token", "bias", "expert_map"])
def test_ops_keep_their_promises(name):
    layer = LAYERS[name]
    t = layer.tensors()
    numbers, act = layer.numbers.numbers(), layer.activation.value
    given = [t[n] for n in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")]
    rest = [t["expert_map"], t["w1_bias"], t["w2_bias"]]
    torch.library.opcheck(
        torch.ops.fusedmoe.fused_experts.default,
        (*given, act, False, -1, *rest, numbers, False, None, "triton", False),
    )
    scratch = [
        torch.zeros(layer.T, layer.K, width, device="cuda", dtype=layer.dtype)
        for width in (layer.I, layer.H)
    ]
    torch.library.opcheck(
        torch.ops.fusedmoe.triton_experts.default,
        (torch.zeros_like(given[0]), *given, act, numbers, *rest, *scratch, False),
    )


def test_rows_past_two_to_the_31_elements():
    """R * H is 2^31 + 2^22: slots at the end have addresses that 32 bits do not hold."""
    layer = replace(GPU, T=1, K=2, E=2, H=2048, I=32)
    T = (2**31 + 2**22) // (2 * 2048)
    tensors = layer.tensors()
    sample = torch.tensor([0, 1, T // 2, T - 2, T - 1], device="cuda")
    tensors["hidden_states"] = torch.randn(T, 2048, device="cuda", dtype=torch.bfloat16)
    tensors["topk_ids"] = torch.randint(0, 2, (T, 2), device="cuda", dtype=torch.int32)
    tensors["topk_weights"] = torch.rand(T, 2, device="cuda")
    out = call(layer, tensors)
    assert not out.isnan().any()
    part = {n: tensors[n][sample] for n in ("hidden_states", "topk_weights", "topk_ids")}
    assert_right(out[sample], layer, tensors | part)


def test_weights_past_two_to_the_31_elements():
    layer = replace(GPU, T=2, K=1, E=2)
    e, H = 9, 16384
    w1 = torch.zeros(e, H, H, device="cuda", dtype=torch.bfloat16)
    w2 = torch.zeros(e, H, H // 2, device="cuda", dtype=torch.bfloat16)
    w1[8].normal_(std=H**-0.5)
    w2[8].normal_(std=H**-0.5)
    tensors = {
        "hidden_states": torch.randn(2, H, device="cuda", dtype=torch.bfloat16),
        "w1": w1,
        "w2": w2,
        "topk_weights": torch.ones(2, 1, device="cuda"),
        "topk_ids": torch.tensor([[8], [0]], device="cuda"),
        "w1_bias": None,
        "w2_bias": None,
        "expert_map": None,
    }
    out = call(layer, tensors)
    assert (out[1] == 0).all()
    assert_right(out, layer, tensors)
