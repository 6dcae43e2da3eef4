"""Blocks and layers that torch.compile sees as one operator, in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe.integrations.transformers.accelerate import accelerated_blocks
from fusedmoe.runner.replay import GraphReplay

pytest.importorskip("transformers")
from hf import tiny_models

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_replayed_steps_give_what_eager_ones_give(name):
    """Other rows in each replay; shared experts, and weights returned beside, included."""
    model = tiny_models.build(tiny_models.by_name(name)).to("cuda", torch.bfloat16)
    model = fusedmoe.accelerate(model)
    block = model.get_submodule(next(iter(accelerated_blocks(model))))
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(3, 1, 32, device="cuda", dtype=torch.bfloat16)
        wanted, got = block(x), compiled(x)
        pairs = zip(wanted, got, strict=True) if isinstance(got, tuple) else [(wanted, got)]
        for ours, theirs in pairs:
            assert tiny_models.relative_error(theirs, ours) <= 1e-2


@torch.no_grad()
def test_replayed_steps_of_a_layer_give_what_eager_ones_give():
    """New weights in the same place included, and those in another one."""
    layer = fusedmoe.FusedMoE(
        *(8, 2, 64, 64, torch.bfloat16),
        shared_experts=torch.nn.Linear(64, 64),
        e_score_correction_bias=torch.randn(8),
        scoring_func="sigmoid",
        use_grouped_topk=True,
        num_expert_group=2,
        topk_group=1,
    ).to("cuda", torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    weight = layer.routed_experts.w13_weight
    for seed in range(8):
        torch.manual_seed(seed)
        rows = [torch.randn(3, n, device="cuda", dtype=torch.bfloat16) for n in (64, 8)]
        wanted, got = layer(*rows), compiled(*rows)
        assert tiny_models.relative_error(got, wanted) <= 1e-2
        if seed == 3:
            weight.mul_(-0.5)
        if seed == 5:
            weight.data = weight.data * 0.5


@torch.no_grad()
def test_a_replayed_layer_outlives_a_graph_of_the_compilers():
    """Which frees cuBLAS's scratch memory before it is captured; these layers' GEMMs need some."""
    wide = torch.nn.Sequential(torch.nn.Linear(2048, 5632), torch.nn.Linear(5632, 2048))
    layer = fusedmoe.FusedMoE(8, 2, 2048, 64, torch.bfloat16, shared_experts=wide)
    layer = layer.to("cuda", torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    replay = GraphReplay(lambda *rows: (layer(*rows),), lambda: True)
    rows = [torch.randn(2, n, device="cuda", dtype=torch.bfloat16) for n in (2048, 8)]
    wanted = layer(*rows)
    for _ in range(3):
        (got,) = replay(tuple(rows), ())
        assert tiny_models.relative_error(got, wanted) <= 1e-2
    compiled = torch.compile(torch.nn.Linear(2048, 4096).to("cuda"), mode="reduce-overhead")
    for _ in range(3):
        compiled(torch.randn(3, 2048, device="cuda"))
    torch.full((1 << 26,), torch.nan, device="cuda")
    for _ in range(3):
        (got,) = replay(tuple(rows), ())
        assert tiny_models.relative_error(got, wanted) <= 1e-2
