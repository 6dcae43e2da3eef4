"""``fusedmoe.accelerate`` on a GPU: moved models, CUDA graphs, no synchronisation, compilation."""

from __future__ import annotations

import copy

import pytest
import torch

import fusedmoe
from fusedmoe.integrations.transformers.accelerate import _replacement, accelerated_blocks
from fusedmoe.integrations.transformers.blocks import BlockForward

pytest.importorskip("transformers")
from hf import tiny_models

pytestmark = pytest.mark.gpu

NAMES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "deepseek_v4",
    "glm4_moe",
    "gpt_oss",
    "llama4",
    "dbrx",
    "longcat_flash",
    "nemotron_h",
    "phimoe",
    "gemma4",
    "aria",
    "jetmoe",
]
# These need token ids or a whole decoder layer to be called alone.
ALONE = [name for name in NAMES if name not in ("deepseek_v4", "gemma4")]


def on_gpu(model, dtype=torch.float32):
    return model.to("cuda", dtype)


def logits(row, model):
    inputs = {key: value.cuda() for key, value in tiny_models.INPUTS[row.inputs](model).items()}
    with torch.no_grad():
        return model(**inputs).logits


def block_of(name, dtype=torch.bfloat16):
    """(our block, the same one with its own forward) of a tiny model on the GPU."""
    plain = on_gpu(tiny_models.build(tiny_models.by_name(name)), dtype)
    model = fusedmoe.accelerate(copy.deepcopy(plain))
    path, ours = next(
        (path, module)
        for path, module in model.named_modules()
        if isinstance(_replacement(module), BlockForward)
    )
    return ours, plain.get_submodule(path)


def hidden(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_fp32(name):
    row = tiny_models.by_name(name)
    plain = on_gpu(tiny_models.build(row))
    wanted = logits(row, plain)
    got = logits(row, fusedmoe.accelerate(plain))
    assert tiny_models.relative_error(got, wanted) <= 2e-3


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "deepseek_v3"])
def test_a_model_accelerated_on_the_cpu_moves_to_the_gpu_and_back(name):
    row = tiny_models.by_name(name)
    wanted, _ = tiny_models.eager_results(name)
    model = fusedmoe.accelerate(tiny_models.build(row))
    got = logits(row, on_gpu(model)).cpu()
    assert tiny_models.relative_error(got, wanted) <= 2e-3
    assert tiny_models.relative_error(tiny_models.logits(row, model.cpu()), wanted) <= 1e-4
    assert len(accelerated_blocks(model)) == 2


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_a_block_in_16_bits(name, dtype, tokens):
    ours, plain = block_of(name, dtype)
    torch.manual_seed(0)
    x = torch.randn(1, tokens, 32, device="cuda", dtype=dtype)
    got, wanted = hidden(ours(x)).float(), hidden(plain(x)).float()
    # A rounded logit may choose another expert for a few rows; the others must agree.
    difference = (got - wanted).abs().amax(-1).flatten() / wanted.abs().max()
    assert difference.median() <= 2e-2
    assert (difference <= 5e-2).float().mean() >= 0.9 or tokens == 1


@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_a_block_is_captured_in_a_cuda_graph(name):
    ours, _ = block_of(name)
    x = torch.randn(1, 5, 32, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hidden(ours(x))
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(captured, hidden(ours(x)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_a_block_does_not_wait_for_the_gpu(name):
    ours, _ = block_of(name)
    x = torch.randn(1, 9, 32, device="cuda", dtype=torch.bfloat16)
    ours(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_compiled_model_is_one_graph(name):
    row = tiny_models.by_name(name)
    model = fusedmoe.accelerate(on_gpu(tiny_models.build(row)))
    wanted = logits(row, model)
    compiled = torch.compile(model, fullgraph=True)
    assert tiny_models.relative_error(logits(row, compiled), wanted) <= 2e-3
