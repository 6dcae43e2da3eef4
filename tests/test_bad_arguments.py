"""What is wrong with a call is said when it is made, with what was given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import FusedMoE, MoEOptions
from fusedmoe.integrations import megatron
from fusedmoe.quantization.formats import format_named, quantize

E, K, H, I = 8, 2, 64, 96  # noqa: E741
layer = partial(FusedMoE, E, K, H, I, params_dtype=torch.float32)
NO_OPTIONS = {"experts": "torch"}


def experts(**changes: object) -> torch.Tensor:
    given = {
        "hidden_states": torch.randn(5, H),
        "w1": torch.randn(E, 2 * I, H),
        "w2": torch.randn(E, H, I),
        "topk_weights": torch.rand(5, K),
        "topk_ids": torch.randint(0, E, (5, K)),
    }
    return fusedmoe.fused_experts(**(given | changes))


IDS = torch.randint(0, E, (5, K))


def quantized_experts(device: str = "cpu", w2_bias: torch.Tensor | None = None) -> torch.Tensor:
    """With the scales of w2 on ``device``."""
    w1, w2 = (quantize(torch.randn(E, *s), format_named("int8")) for s in ((2 * I, H), (H, I)))
    config = fusedmoe.gptq_marlin_moe_quant_config(
        w1.scale, w2.scale.to(device), 8, -1, w2_bias=w2_bias
    )
    return experts(w1=w1.data, w2=w2.data, quant_config=config)


def nvfp4_config(gscale: torch.Tensor) -> object:
    scales = [torch.ones(E, n, 4).to(torch.float8_e4m3fn) for n in (2 * I, H)]
    return fusedmoe.nvfp4_moe_quant_config(torch.ones(E), torch.ones(E), gscale, gscale, *scales)


def grouped_product(C: torch.Tensor) -> None:
    valid = torch.tensor([5], dtype=torch.int32)
    table = megatron._moe_align_block_size_cuda_graphable(IDS, 16, E, 0, valid)
    A, B = torch.randn(5, H), torch.randn(E, I, H)
    config = megatron._get_default_config(5, E, K)
    megatron._invoke_fused_moe_kernel(A, B, C, None, *table, False, K, config, 4)


def unpermute(
    offsets: Sequence[int] = (0, 10),
    rows: tuple[int, ...] = (10, H),
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    index = torch.arange(10, dtype=torch.int32)
    out, weights = torch.empty(5, H), torch.rand(5, K)
    return fusedmoe.moe_unpermute(
        out, torch.randn(rows), weights, index, torch.tensor(offsets, dtype=dtype)
    )


CALLS = {
    "options of a layer": (partial(layer, options=NO_OPTIONS), "MoEOptions, got {'experts'"),
    "options of a call": (partial(experts, options=NO_OPTIONS), "MoEOptions, got {'experts'"),
    "options of a model": (
        lambda: fusedmoe.accelerate(nn.Linear(2, 2), options="torch"),
        "MoEOptions, got 'torch'",
    ),
    "options of a folder": (
        lambda: fusedmoe.from_pretrained("nowhere", options=3),
        "MoEOptions, got 3",
    ),
    "no model": (lambda: fusedmoe.accelerate("mixtral"), "takes a model, not a str"),
    "a format's bits": (partial(fusedmoe.quantize_layer, format=4), "'int4_g128', got 4"),
    "a model to quantize": (
        lambda: fusedmoe.quantize_layer(nn.Linear(2, 2), "int8"),
        "not a Linear; fusedmoe.from_pretrained",
    ),
    "a dtype of integers": (
        partial(layer, params_dtype=torch.int8),
        "floating point, got torch.int8",
    ),
    "a number of experts out of a JSON file": (
        partial(FusedMoE, 8.0, K, H, I),
        "num_experts must be an integer, got 8.0",
    ),
    "a size that the config lacks": (
        partial(FusedMoE, E, K, H, None),
        "intermediate_size must be an integer, got None",
    ),
    "names of a checkpoint": (partial(layer, ckpt_names=("w1", "w2")), r"\('w1', 'w2'\)"),
    "one name": (partial(layer, ckpt_names="w13"), "got 'w13'"),
    "a bias of other experts": (
        partial(layer, scoring_func="sigmoid", e_score_correction_bias=torch.zeros(7)),
        r"correction_bias must be \[8\], got \(7,\)",
    ),
    "a table of other picks": (
        partial(layer, hash_indices_table=torch.zeros(9, 3, dtype=torch.int32)),
        r"\[vocab, 2\], got \(9, 3\)",
    ),
    "a group in the place of groups": (
        partial(layer, parallel=object()),
        r"ParallelGroups\(tp=group\), got a object",
    ),
    "experts that are none": (
        partial(layer, options=MoEOptions(experts=int)),
        "names int, which is no FusedMoEExperts",
    ),
    "a mover that is none": (
        partial(layer, options=MoEOptions(prepare_finalize=nn.Linear)),
        "names Linear, which is no FusedMoEPrepareAndFinalize",
    ),
    "names without tensors": (
        lambda: layer().load_weights(["0.gate_proj.weight"]),
        r"\(name, tensor\) pairs, got a str",
    ),
    "a name with a number": (
        lambda: layer().routed_experts.load_weights([("0.gate_proj.weight", 3)]),
        "0.gate_proj.weight: expected a tensor, found a int",
    ),
    "an array of numpy": (
        lambda: layer().load_weights({"0.gate_proj.weight": torch.zeros(I, H).numpy()}),
        "0.gate_proj.weight: expected a tensor, found a ndarray",
    ),
    "an activation": (partial(experts, activation="sigh"), "'sigh'; known: silu"),
    "weights elsewhere": (
        partial(experts, w1=torch.empty(E, 2 * I, H, device="meta")),
        "w1 is on meta, hidden_states on cpu",
    ),
    "picks elsewhere": (
        partial(experts, topk_ids=torch.empty(5, K, dtype=torch.int32, device="meta")),
        "topk_ids is on meta, hidden_states on cpu",
    ),
    "router weights elsewhere": (
        partial(experts, topk_weights=torch.empty(5, K, device="meta")),
        "topk_weights is on meta, hidden_states on cpu",
    ),
    "a map elsewhere": (
        partial(experts, expert_map=torch.empty(E, dtype=torch.int32, device="meta")),
        "expert_map is on meta, topk_ids on cpu",
    ),
    "scales elsewhere": (partial(quantized_experts, device="meta"), "w2's scale is on meta"),
    "biases of other sizes": (
        partial(quantized_experts, w2_bias=torch.zeros(0, H)),
        r"w2_bias is \(0, 64\), expected \(8, 64\)",
    ),
    "global scales of other experts": (
        partial(nvfp4_config, gscale=torch.ones(3)),
        r"scales \(8,\) and global scales of activations \(3,\)",
    ),
    "no global scale": (
        partial(nvfp4_config, gscale=torch.ones(0)),
        r"or \[e\], got none",
    ),
    "a product into a scalar": (partial(grouped_product, C=torch.zeros(())), r"\[R, N\] or"),
    "a product into uneven slots": (
        partial(grouped_product, C=torch.zeros(K, 5, I).transpose(0, 1)),
        r"\(5, 2, 96\) has strides",
    ),
    "tiles for no experts": (partial(megatron._get_default_config, 5, 0, K), "E must be positive"),
    "a product into nothing": (partial(grouped_product, C=torch.zeros(10, 0)), r"\(10, 0\)"),
    "logits elsewhere": (
        lambda: layer()(torch.randn(5, H), torch.empty(5, E, device="meta")),
        "router_logits are on meta, tokens on cpu",
    ),
    "a tensor without values": (
        lambda: layer().load_weights([("0.down_proj.weight", torch.empty(H, I, device="meta"))]),
        "0.down_proj.weight: is on 'meta', where it has no values",
    ),
    "tokens of no width": (
        lambda: layer()(torch.empty(5, 0), torch.randn(5, E)),
        r"hidden_states must be \[..., H\], got \(5, 0\)",
    ),
    "an empty map to count by": (
        lambda: fusedmoe.count_expert_num_tokens(IDS, E, torch.empty(0, dtype=torch.int32)),
        r"not empty and int32 or int64, got torch.int32 \(0,\)",
    ),
    "a map of floats": (
        lambda: fusedmoe.remap_topk_to_local(IDS, torch.zeros(E)),
        r"int32 or int64, got torch.float32 \(8,\)",
    ),
    "rows to permute in a line": (
        lambda: fusedmoe.moe_permute(torch.randn(80), None, IDS, E),
        r"hidden_states must be \[T, H\], got \(80,\)",
    ),
    "no offsets": (partial(unpermute, offsets=[]), r"must be \[e \+ 1\], got \(0,\)"),
    "offsets in floats": (partial(unpermute, dtype=torch.float32), "tables must be integers"),
    "rows to unpermute with another axis": (
        partial(unpermute, rows=(1, 10, H)),
        r"rows \(1, 10, 64\) do not fit out",
    ),
    "an activation of a scalar": (
        lambda: fusedmoe.apply_moe_activation(
            fusedmoe.MoEActivation.SILU, torch.empty(()), torch.tensor(1.0)
        ),
        r"input must be \[..., S \* I\], got a scalar",
    ),
    "a scalar of logits": (
        lambda: fusedmoe.fused_topk(torch.randn(5, H), torch.tensor(1.0), K, True),
        r"gating_output \[T, E\], got \(5, 64\) and \(\)",
    ),
    "logits to simulate in a line": (
        lambda: fusedmoe.RoutingSimulator.simulate_routing(
            torch.randn(5, H), torch.randn(40), "uniform_random", K
        ),
        r"router_logits must be \[T, E\], got \(40,\)",
    ),
    "a layer to capture that is none": (
        lambda: fusedmoe.RoutedExpertsCapturer(8, 3, K, E, "cpu").capture(3, IDS),
        r"layer 3 does not lie in \[0, 3\)",
    ),
    "a capturer without layers": (
        lambda: fusedmoe.RoutedExpertsCapturer(8, -2, K, E, "cpu"),
        "num_layers -2 and top_k 2 must be at least 1",
    ),
    "logits in 8 bits": (
        lambda: fusedmoe.GateLinear(H, E, out_dtype=torch.float8_e4m3fn),
        "logits must be floating point of 16 bits or more",
    ),
    "a gate of integers": (
        lambda: fusedmoe.GateLinear(H, E, params_dtype=torch.int64),
        "weights must be floating point of 16 bits or more",
    ),
    "no shards": (
        lambda: quantize(torch.randn(E, 2 * I, H), format_named("int4_g32"), shards=0),
        "192 rows are not 0 equal shards",
    ),
    "picks to substitute in a line": (
        lambda: fusedmoe.ExpertSubstitution(E, [1], torch.randn(1, H))(torch.rand(10), IDS),
        r"must be \[T, K\], got \(10,\) and \(5, 2\)",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_was_given_is_named(name):
    call, words = CALLS[name]
    arguments = (layer(),) if name == "a format's bits" else ()
    with pytest.raises(ValueError, match=words):
        call(*arguments)


def test_an_activation_may_be_given_by_its_name():
    torch.manual_seed(0)
    by_name = experts(activation="gelu")
    torch.manual_seed(0)
    assert torch.equal(by_name, experts(activation=fusedmoe.MoEActivation.GELU))


def test_no_options_are_the_defaults():
    assert MoEOptions.of(None) == MoEOptions()
