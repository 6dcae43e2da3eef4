"""Quantized layers on a GPU after they were moved, copied, cast or given other weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import fusedmoe
from fusedmoe import MoEOptions
from fusedmoe.quantization import keys
from quantized_layers import make_layer

pytestmark = pytest.mark.gpu
sys.path.append(str(Path(__file__).parents[1] / "dialects"))

BF16, DEFAULT = torch.bfloat16, MoEOptions()
KINDS = (
    *(("int4_g32", None), ("int4_g32_act_order", None), ("int8_channel", None), ("mxfp4", None)),
    *(("fp8_block", keys.FP8_DYNAMIC_128), ("fp8_tensor", keys.FP8_STATIC_TENSOR)),
    *(("int8_channel", keys.INT8_DYNAMIC_TOKEN), ("nvfp4", keys.NVFP4_DYNAMIC)),
)


def layer_of(kind, key, scale=0.02):
    layer = make_layer(kind, key, dtype=BF16, options=DEFAULT, input_scale=scale)[0]
    return layer.to("cuda")


def inputs(T=5, dtype=BF16):
    torch.manual_seed(T)
    return torch.randn(T, 128, device="cuda", dtype=dtype), torch.randn(T, 4, device="cuda")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "key"), KINDS, ids=str)
def test_copies_compute_the_same_from_their_own_weights(kind, key):
    layer, (x, logits) = layer_of(kind, key), inputs()
    wanted = layer(x, logits)
    twin, state = copy.deepcopy(layer), copy.deepcopy(layer.state_dict())
    for parameter in layer.parameters():
        parameter.data.view(torch.uint8).zero_()
    assert torch.equal(twin(x, logits), wanted)
    layer.load_state_dict(state)
    assert torch.equal(layer(x, logits), wanted)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "key"), KINDS, ids=str)
def test_there_and_back_and_in_another_dtype(kind, key):
    layer, (x, logits) = layer_of(kind, key), inputs()
    wanted = layer(x, logits)
    assert torch.equal(layer.cpu().cuda()(x, logits), wanted)
    half = layer.to(torch.float16)(x.half(), logits)
    assert half.dtype == torch.float16
    assert (half.float() - wanted.float()).norm() < 0.05 * wanted.float().norm()
    assert torch.equal(layer.to(BF16)(x, logits), wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "key"),
    [("fp8_tensor", keys.FP8_STATIC_TENSOR), ("int4_g32_act_order", None), ("fp8_block", None)],
)
def test_captured_graphs_run_on_the_weights_of_a_loaded_state(kind, key):
    one, two = layer_of(kind, key, 0.02), layer_of(kind, key, 0.003)
    two.routed_experts.w2_weight_scale.data.mul_(0.5)
    two.routed_experts.process_weights_after_loading()
    x, logits = inputs()
    wanted = two(x, logits)
    for _ in range(2):
        assert not torch.equal(one(x, logits), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = one(x, logits)
    one.load_state_dict(two.state_dict())
    graph.replay()
    assert torch.equal(out, wanted)


@torch.no_grad()
@pytest.mark.parametrize("case", ["ct w4a16", "fp8 per tensor", "gptq act-order", "deepseek"])
def test_accelerated_models_follow_what_is_done_to_them(case, tmp_path):
    pytest.importorskip("transformers")
    from folders import write_folders
    from writers import CASES

    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES[case]).packed
    prompt = torch.tensor([[1, 40, 77, 300, 12, 9, 211, 5]], device="cuda")
    model = fusedmoe.accelerate(fusedmoe.from_pretrained(folder, dtype="bf16"))
    model.to("cuda")  # after blocks were replaced on the CPU
    there = fusedmoe.accelerate(fusedmoe.from_pretrained(folder, dtype="bf16", device="cuda"))
    for _ in range(4):  # small batches are replayed from the third on
        wanted = there(prompt).logits
        assert torch.equal(model(prompt).logits, wanted)
    state = copy.deepcopy(model.state_dict())
    scales = [n for n in state if n.endswith(("_weight_scale", "_input_scale"))]
    other = state | {name: state[name] * 2 for name in scales}
    model.load_state_dict(other)
    changed = model(prompt).logits
    assert not torch.equal(changed, wanted)
    assert torch.equal(copy.deepcopy(model)(prompt).logits, changed)
    model.load_state_dict(state)
    assert torch.equal(model(prompt).logits, wanted)
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 12)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "key"), KINDS[-5:-1], ids=str)
def test_compiled_code_runs_what_eager_code_runs(kind, key):
    """Router and experts are one operator, with the kernels that a compiler cannot look into."""
    layer = layer_of(kind, key)
    for T in (5, 600):
        rows = inputs(T)
        wanted = layer(*rows)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            assert torch.equal(compiled(*rows), wanted)
        other = rows[0].neg(), rows[1].flip(1)
        assert torch.equal(compiled(*other), layer(*other))
