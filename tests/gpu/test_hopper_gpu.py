"""The Hopper experts on their GPU: every kernel and feature, graphs, compilation, 2^31."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import MoEOptions
from fusedmoe.experts.functional import fused_experts
from fusedmoe.experts.hopper import HopperExperts, hopper_experts, scratch_rows
from fusedmoe.experts.hopper_support import missing_gluon
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.selection import select
from fusedmoe.tuning.hopper_tiles import (
    DecodeGemmTile,
    DecodeTiles,
    DirectTiles,
    PrefillTiles,
    decode_tiles_of,
    direct_tiles,
    hopper_tiles,
)
from gpu_layers import (
    GPU,
    assert_replays_follow_new_routing,
    assert_right,
    compiled_apply,
    rows_past_two_to_the_31,
    weights_past_two_to_the_31,
)
from gpu_marks import needs_hopper

pytestmark = [pytest.mark.gpu, needs_hopper]
NAN = float("nan")
LAYERS = {
    "one_token": replace(GPU, T=1),
    "one_token_of_few_experts_here": replace(GPU, T=1, K=8, E=64, local=20, bias=True),
    "two_tokens": replace(GPU, T=2, K=8, E=64),
    "one_pick": replace(GPU, T=1, K=1, bias=True),
    "three_picks": replace(GPU, T=1, K=3),
    "few": replace(GPU, T=8, K=8, E=64),
    "a_block_each": replace(GPU, T=64),
    "half_blocks": replace(GPU, T=512, K=2, E=8),
    "whole_blocks": replace(GPU, T=2048, K=2, E=4),
    "odd_sizes": replace(GPU, H=272, I=208, T=77),
    "odd_sizes_many": replace(GPU, H=272, I=208, T=1777),
    "every_expert": replace(GPU, K=16, T=9),
    "bias": replace(GPU, bias=True),
    "expert_map": replace(GPU, E=32, local=5, T=300),
    "no_gate": replace(GPU, activation=MoEActivation.RELU2_NO_MUL, T=600, bias=True),
    "no_gate_one_token": replace(GPU, activation=MoEActivation.SILU_NO_MUL, T=1, bias=True),
    "interleaved": replace(GPU, activation=MoEActivation.SWIGLUOAI, bias=True, T=1500),
    "interleaved_few": replace(GPU, activation=MoEActivation.SWIGLUOAI, bias=True, T=5),
    "interleaved_one_token": replace(GPU, activation=MoEActivation.SWIGLUOAI, bias=True, T=1),
    "gelu": replace(GPU, activation=MoEActivation.GELU),
    "gelu_tanh": replace(GPU, activation=MoEActivation.GELU_TANH, T=2000),
    "clamped": replace(GPU, numbers=ApplyMoEActivationConfig(clamp_limit=0.5)),
    "weight_on_input": replace(GPU, K=1, weight_on_input=True),
    "rows_discarded": replace(GPU, H=1024, E=128, T=1024),
    "rows_discarded_many": replace(GPU, H=1088, E=16, T=3000),
    "passes": replace(GPU, T=200, options=MoEOptions(max_workspace_bytes=100_000)),
}
KINDS = {
    "narrow8": decode_tiles_of(8, 64, 128),
    "narrow16": decode_tiles_of(16, 64, 64),
    "stacked": decode_tiles_of(8, 32, 128),
    "stacked_drawn": DecodeTiles(16, DecodeGemmTile(32, 128, 2), DecodeGemmTile(128, 128, 2)),
    "wide8": decode_tiles_of(8, 128, 256),
    "wide32": decode_tiles_of(32, 128, 256),
    "wide64": decode_tiles_of(64, 128, 256),
    "prefill": PrefillTiles(),
    "prefill_shallow": PrefillTiles(stages=3, group=2),
}


def run(layer, tensors, tiles=None, batch_invariant=False):
    """``hopper_experts`` with poisoned scratch and output."""
    e, T = tensors["w1"].shape[0], tensors["topk_ids"].shape[0]
    sizes = (T, layer.K, layer.E, e, layer.H, layer.I)
    chosen = tiles or hopper_tiles(*sizes, batch_invariant=batch_invariant)
    x = tensors["hidden_states"]
    rows = scratch_rows(chosen, T * layer.K, e)
    weights = tensors["topk_weights"]
    if layer.weight_on_input:
        x = x * weights.to(x.dtype)
    work = ExpertsWork(
        torch.full_like(x, NAN),
        x,
        tensors["w1"],
        tensors["w2"],
        weights,
        tensors["topk_ids"],
        layer.activation,
        layer.E,
        tensors["expert_map"],
        workspace13=x.new_full((rows, layer.I), NAN),
        workspace2=x.new_full((rows, layer.H), NAN),
        apply_router_weight_on_input=layer.weight_on_input,
    )
    biases = tensors["w1_bias"], tensors["w2_bias"]
    how = {"batch_invariant": batch_invariant, "tiles": tiles}
    hopper_experts(work, layer.numbers, *biases, **how)
    return work.output


def test_gluon_is_there():
    assert missing_gluon() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype):
    layer = replace(LAYERS[name], dtype=dtype)
    tensors = layer.tensors()
    whole = run(layer, tensors)
    assert_right(whole, layer, tensors)
    mover = MoEPrepareAndFinalizeNoDPEPModular()
    assert_right(layer.run(HopperExperts, mover, tensors), layer, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["one_token", "few", "odd_sizes", "bias", "expert_map", "no_gate", "interleaved"]
)
def test_every_kernel_runs_every_size(name, kind):
    layer = LAYERS[name]
    tensors = layer.tensors()
    assert_right(run(layer, tensors, KINDS[kind]), layer, tensors)


SKEWED = {
    "halves": (64, 128, 1, 65, 127, 129, 192, 193),
    "one_with_most": (1, 3000, 2, 0, 64, 5, 0, 63),
    "nothing_here": (0,) * 8,
}


@pytest.mark.parametrize("counts", SKEWED.values(), ids=SKEWED)
@pytest.mark.parametrize("name", ["plain", "bias", "no_gate"])
def test_half_empty_blocks_give_the_bits_of_streamed_ones(counts, name):
    """Experts with so many slots; nothing is read from scratch that nobody wrote (it is NaN)."""
    plain = replace(GPU, T=max(1, sum(counts)), K=1, E=8, H=1040, I=272)
    layer = {
        "plain": plain,
        "bias": replace(plain, bias=True, activation=MoEActivation.SWIGLUOAI),
        "no_gate": replace(plain, activation=MoEActivation.RELU2_NO_MUL),
    }[name]
    tensors = layer.tensors()
    ids = torch.repeat_interleave(torch.arange(8), torch.tensor(counts))
    tensors["topk_ids"].fill_(-1)
    if len(ids):
        shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
        tensors["topk_ids"].copy_(shuffled[:, None])
    expected = run(layer, tensors, decode_tiles_of(64, 64, 128))
    assert_right(expected, layer, tensors)
    for tiles in (PrefillTiles(), PrefillTiles(stages=3), PrefillTiles(group=4)):
        assert run(layer, tensors, tiles).equal(expected)


def tensors_picking(layer, counts):
    """A layer's tensors whose tokens pick each of the experts so many times, in their order."""
    tensors = layer.tensors()
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tensors["topk_ids"].fill_(-1)
    tensors["topk_ids"][: len(ids)] = ids[:, None]
    return tensors


@pytest.mark.parametrize("counts", SKEWED.values(), ids=SKEWED)
def test_tasks_drawn_and_dealt_give_the_same_bits(counts):
    """Rings as long as a task or shorter draw the next one; longer ones are dealt theirs."""
    layer = replace(GPU, T=max(1, sum(counts)), K=1, E=8, H=272, I=272, bias=True)
    tensors = tensors_picking(layer, counts)
    tiles = decode_tiles_of(16, 64, 64)
    expected = run(layer, tensors, tiles)
    assert_right(expected, layer, tensors)
    for up, down in ((2, 2), (3, 3), (5, 3), (2, 5), (3, 6)):
        rings = replace(tiles.up, stages=up), replace(tiles.down, stages=down)
        for _ in range(5):
            assert run(layer, tensors, DecodeTiles(16, *rings)).equal(expected)


@pytest.mark.parametrize("counts", SKEWED.values(), ids=SKEWED)
@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.RELU2_NO_MUL])
def test_tiles_of_fewer_rows_give_the_same_bits(counts, activation):
    """Gate above up in one product."""
    layer = replace(
        GPU, T=max(1, sum(counts)), K=1, E=8, H=1040, I=208, bias=True, activation=activation
    )
    tensors = tensors_picking(layer, counts)
    tiles = decode_tiles_of(16, 64, 128)
    expected = run(layer, tensors, tiles)
    assert_right(expected, layer, tensors)
    for up in (DecodeGemmTile(32, 256, 3), DecodeGemmTile(32, 128, 6), DecodeGemmTile(32, 128, 10)):
        assert run(layer, tensors, replace(tiles, up=up)).equal(expected)


@pytest.mark.parametrize("T", [1, 2, 3, 8])
@pytest.mark.parametrize(("up", "down"), [(16, 8), (32, 32), (48, 24), (64, 16)])
def test_direct_tokens(T, up, down):
    layer = replace(GPU, T=T, E=8, K=4, local=5)
    tensors = layer.tensors()
    tiles = direct_tiles(T, 4, 256, 192)
    tiles = replace(tiles, up_rows=32 if up <= 32 else 64, up_valid=up, up_stages=3)
    tiles = replace(tiles, down_rows=128, down_valid=down, down_stages=3)
    assert_right(run(layer, tensors, tiles), layer, tensors)


@pytest.mark.parametrize("T", [1, 2, 8, 100, 2000])
def test_dead_ids_and_nan_rows(T):
    layer = replace(GPU, T=T, K=6, E=64)
    tensors = layer.tensors()
    ids = tensors["topk_ids"]
    ids[T // 2, 0], ids[T // 2, 1], ids[-1, 2], ids[-1, 3] = 64, 2**31 - 1, -5, -1
    out = run(layer, tensors)
    assert_right(out, layer, tensors)
    tensors["hidden_states"][T // 2] = NAN
    again = run(layer, tensors)
    assert again[T // 2].isnan().all()
    others = torch.arange(T, device="cuda") != T // 2
    assert again[others].equal(out[others])
    ids.fill_(-1)
    assert (run(layer, tensors) == 0).all()


@pytest.mark.parametrize("T", [8, 64, 3000])
def test_all_slots_to_one_expert(T):
    layer = replace(GPU, T=T)
    tensors = layer.tensors()
    tensors["topk_ids"].fill_(5)
    assert_right(run(layer, tensors), layer, tensors)


@pytest.mark.parametrize("T", [1, 100, 2000])
def test_strided_inputs_and_int64_ids(T):
    layer = replace(GPU, T=T)
    tensors = layer.tensors()
    expected = run(layer, tensors)
    x = torch.full((T, 300), NAN, device="cuda", dtype=layer.dtype)
    x[:, 3:259] = tensors["hidden_states"]
    tensors["hidden_states"] = x[:, 3:259]
    ids = torch.full((4, T), -1, device="cuda")
    ids[:] = tensors["topk_ids"].T
    tensors["topk_ids"] = ids.T
    assert run(layer, tensors).equal(expected)
    for name in ("w1", "w2"):
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(run(layer, tensors), layer, tensors)


@pytest.mark.parametrize("T", [1, 64, 1500])
def test_graph_replay_follows_new_routing_without_synchronising(T):
    assert_replays_follow_new_routing(run, T)


@pytest.mark.parametrize("T", [1, 2, 16, 300, 3000])
def test_every_run_gives_the_same_bits(T):
    layer = replace(GPU, T=T, K=8, E=64)
    tensors = layer.tensors()
    first = run(layer, tensors)
    assert all(run(layer, tensors).equal(first) for _ in range(5))


@pytest.mark.parametrize("bias", [False, True])
def test_batch_invariance_is_bitwise(bias):
    layer = replace(GPU, T=4096, K=4, E=16, bias=bias, local=12)
    tensors = layer.tensors()
    whole = run(layer, tensors, batch_invariant=True)
    assert_right(whole, layer, tensors)
    for rows in (slice(7, 8), slice(5, 7), slice(100, 107), slice(64), slice(300, 633)):
        part = {n: tensors[n][rows] for n in ("hidden_states", "topk_weights", "topk_ids")}
        assert run(layer, tensors | part, batch_invariant=True).equal(whole[rows])


@pytest.mark.parametrize("T", [1, 200])
def test_compiled_without_graph_breaks(T):
    layer = replace(GPU, T=T, bias=True)
    tensors = layer.tensors()
    expected = run(layer, tensors)
    experts = HopperExperts(layer.config(), layer_quant(tensors))
    assert compiled_apply(experts, layer, tensors).equal(expected)


def layer_quant(tensors):
    from fusedmoe.quantization.config import biased_moe_quant_config

    return biased_moe_quant_config(tensors["w1_bias"], tensors["w2_bias"])


@pytest.mark.parametrize("name", ["one_token", "bias", "expert_map"])
def test_the_op_keeps_its_promises(name):
    layer = LAYERS[name]
    t = layer.tensors()
    given = [t[n] for n in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")]
    scratch = [
        torch.zeros(layer.T * layer.K, width, device="cuda", dtype=layer.dtype)
        for width in (layer.I, layer.H)
    ]
    torch.library.opcheck(
        torch.ops.fusedmoe.hopper_experts.default,
        (
            torch.zeros_like(given[0]),
            *given,
            layer.activation.value,
            layer.E,
            t["expert_map"],
            *(None, None, *scratch, False),
            layer.numbers.numbers(),
            t["w1_bias"],
            t["w2_bias"],
            *(False, None),
        ),
    )


def test_rows_past_two_to_the_31_elements():
    layer, tensors, sample, part = rows_past_two_to_the_31()
    for tiles in (None, decode_tiles_of(64, 128, 256)):
        out = run(layer, tensors, tiles)
        assert not out.isnan().any()
        assert_right(out[sample], layer, part)


@pytest.mark.parametrize("tiles", [None, *KINDS.values()])
def test_weights_past_two_to_the_31_elements(tiles):
    layer, tensors = weights_past_two_to_the_31()
    out = run(layer, tensors, tiles)
    assert (out[1] == 0).all()
    assert_right(out, layer, tensors)


@pytest.mark.parametrize("local", [None, 12, 5])
@pytest.mark.parametrize("T", [1, 64, 4000])
def test_kernels_agree(T, local):
    """To the bit, but for the one that keeps the second GEMM's rows in fp32."""
    layer = replace(GPU, T=T, K=4, E=16, H=1024, I=512, local=local)
    tensors = layer.tensors()
    outputs = [run(layer, tensors, tiles) for tiles in KINDS.values()]
    if T == 1:
        outputs.append(run(layer, tensors, direct_tiles(1, 4, 1024, 512)))
        assert isinstance(hopper_tiles(1, 4, 16, 16, 1024, 512), DirectTiles)
    assert all(out.equal(outputs[0]) for out in outputs[1 : len(KINDS)])
    for out in outputs[1:]:
        error = (out - outputs[0]).abs().max() / outputs[0].abs().max().clamp(min=1e-6)
        assert error < 1e-2


@pytest.mark.parametrize("T", [1, 40, 700])
def test_it_is_what_a_bf16_layer_gets(T):
    """From the functional form and from a layer, also in passes of bounded memory."""
    layer = replace(GPU, T=T, bias=True, local=9)
    tensors = layer.tensors()
    chosen = select(layer.config())
    assert chosen.chosen is HopperExperts
    assert select(replace(layer, dtype=torch.float32).config()).chosen is not HopperExperts
    assert "multiples of 16" in str(select(replace(layer, H=264).config()))
    expected = run(layer, tensors)
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids", "expert_map")
    given = {name: tensors[name] for name in names} | {
        "quant_config": layer_quant(tensors),
        "global_num_experts": layer.E,
    }
    assert fused_experts(**given).equal(expected)
    bounded = fused_experts(**given, options=MoEOptions(max_workspace_bytes=200_000))
    assert_right(bounded, layer, tensors)
