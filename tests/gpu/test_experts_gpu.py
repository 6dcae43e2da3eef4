"""The Triton experts on a GPU: every dtype, graphs, compilation, no synchronisation, 2^31."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedmoe import BatchedTritonExperts, MoEOptions, fused_experts
from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.grouped_mm import GroupedMMExperts
from fusedmoe.experts.triton import TritonExperts
from fusedmoe.prepare_finalize.batched import BatchedPrepareAndFinalize
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.config import biased_moe_quant_config
from gpu_layers import (
    GPU,
    assert_replays_follow_new_routing,
    assert_right,
    compiled_apply,
    rows_past_two_to_the_31,
    weights_past_two_to_the_31,
)

pytestmark = pytest.mark.gpu
NAN = float("nan")
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
    assert_replays_follow_new_routing(call, T)


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
    assert compiled_apply(experts, layer, tensors).equal(expected)


@pytest.mark.parametrize("name", ["one_token", "bias", "expert_map"])
def test_ops_keep_their_promises(name):
    layer = LAYERS[name]
    t = layer.tensors()
    numbers, act = layer.numbers.numbers(), layer.activation.value
    given = [t[n] for n in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")]
    rest = [t["expert_map"], t["w1_bias"], t["w2_bias"]]
    torch.library.opcheck(
        torch.ops.fusedmoe.fused_experts.default,
        (*given, rest[1:], "", rest[0], act, False, -1, numbers, False, None, "triton", False),
    )
    scratch = [
        torch.zeros(layer.T, layer.K, width, device="cuda", dtype=layer.dtype)
        for width in (layer.I, layer.H)
    ]
    out = torch.zeros_like(given[0])
    work = (out, *given, act, layer.E, rest[0], None, None, *scratch, False)
    torch.library.opcheck(
        torch.ops.fusedmoe.triton_experts.default, (*work, numbers, *rest[1:], False, None)
    )


def test_rows_past_two_to_the_31_elements():
    layer, tensors, sample, part = rows_past_two_to_the_31()
    out = call(layer, tensors)
    assert not out.isnan().any()
    assert_right(out[sample], layer, part)


def test_weights_past_two_to_the_31_elements():
    layer, tensors = weights_past_two_to_the_31()
    out = call(layer, tensors)
    assert (out[1] == 0).all()
    assert_right(out, layer, tensors)
