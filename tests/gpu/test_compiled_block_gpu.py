"""Accelerated blocks that torch.compile sees as one operator, in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe.integrations.transformers.accelerate import accelerated_blocks

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
