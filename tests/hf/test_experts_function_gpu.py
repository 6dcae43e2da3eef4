"""The Transformers plug on a GPU: bf16, no synchronisation, CUDA graphs, compiled models."""

import copy

import pytest
import tiny_models
import torch
from test_fp8_experts import fp8_module
from test_fp8_experts import routed as fp8_routed

from fusedmoe.integrations.transformers.experts_function import experts_forward

pytestmark = pytest.mark.gpu

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v4", "minimax_m3_vl"]


def experts_on_gpu(name, dtype=torch.bfloat16):
    row = tiny_models.by_name(name)
    model = tiny_models.build(row)
    experts = next(m for m in model.modules() if type(m).__name__ == row.experts_class)
    return experts.to("cuda", dtype)


def routed(experts, T, K=2):
    generator = torch.Generator("cuda").manual_seed(0)
    H = experts.down_proj.shape[2 if experts.is_transposed else 1]
    scores = torch.rand(T, experts.num_experts, device="cuda", generator=generator)
    weights, ids = scores.softmax(-1).topk(K)
    x = torch.randn(T, H, device="cuda", generator=generator)
    return x.to(experts.down_proj.dtype), ids, weights


@pytest.mark.parametrize("T", [0, 1, 7, 300])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_rounding_allows(name, T):
    experts = experts_on_gpu(name)
    x, ids, weights = routed(experts, T)
    exact = copy.deepcopy(experts).float()
    exact.config._experts_implementation = "eager"
    got = experts_forward(experts, x, ids, weights)
    assert got.shape == x.shape
    assert got.dtype == torch.bfloat16
    if T:
        wanted = exact(x.float(), ids, weights)
        assert tiny_models.relative_error(got.float(), wanted) <= 2e-2


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_no_synchronisation_and_capture_in_a_graph(name):
    experts = experts_on_gpu(name)
    x, ids, weights = routed(experts, 5)
    experts_forward(experts, x, ids, weights)  # compiles, and recognises the gate
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = experts_forward(experts, x, ids, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = experts_forward(experts, x, ids, weights)
    got.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_router_weights_may_have_any_dtype(dtype):
    experts = experts_on_gpu("qwen3_moe")
    x, ids, weights = routed(experts, 21)
    weights = weights.to(dtype)
    got = experts_forward(experts, x, ids, weights)
    assert torch.equal(got, experts_forward(experts, x, ids, weights.float()))


@torch.no_grad()
def test_slots_of_other_ranks_count_as_nothing():
    experts = experts_on_gpu("mixtral")
    x, ids, weights = routed(experts, 33)
    away = torch.rand(ids.shape, device="cuda") < 0.5
    got = experts_forward(
        experts, x, ids.masked_fill(away, experts.num_experts), weights.masked_fill(away, 0)
    )
    wanted = experts_forward(experts, x, ids, weights.masked_fill(away, 0))
    assert tiny_models.relative_error(got.float(), wanted.float()) <= 1e-2


@pytest.mark.parametrize(
    "config", [{}, {"scale_fmt": "ue8m0"}, {"expert_dtype": "fp4"}, {"has_gate": False}], ids=str
)
@torch.no_grad()
def test_fp8_experts_give_what_they_give_on_the_cpu(config):
    experts = fp8_module(**config)
    inputs = fp8_routed()
    wanted = experts(*inputs)
    x, ids, weights = (tensor.to("cuda") for tensor in inputs)
    got = experts.to("cuda")(x.bfloat16(), ids, weights)
    assert tiny_models.relative_error(got.float().cpu(), wanted) <= 2e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_models_give_the_tokens_of_eager(name):
    row = tiny_models.by_name(name)
    ids = tiny_models.token_ids().to("cuda")
    tokens = []
    for implementation in ("eager", "fusedmoe"):
        model = tiny_models.build(row, experts_implementation=implementation).to("cuda")
        tokens.append(
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=32,
                min_new_tokens=32,
                do_sample=False,
                pad_token_id=0,
            )
        )
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_a_compiled_model_has_no_graph_break(name):
    row = tiny_models.by_name(name)
    model = tiny_models.build(row, experts_implementation="fusedmoe").to("cuda")
    ids = tiny_models.token_ids().to("cuda")
    wanted = model(input_ids=ids, use_cache=False).logits
    got = torch.compile(model, fullgraph=True)(input_ids=ids, use_cache=False).logits
    assert tiny_models.relative_error(got.float(), wanted.float()) <= 1e-4
