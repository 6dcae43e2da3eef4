"""The rules in the rows of model families against Transformers' own router classes, in fp32."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from fusedmoe.integrations.transformers.families import at
from fusedmoe.integrations.transformers.rows import FAMILIES
from fusedmoe.router.functional import route
from fusedmoe.router.spec import RoutingTensors

pytest.importorskip("transformers")

T, H, E = 40, 24, 16


def router_of(family: str, name: str, **config):
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    shared = {"hidden_size": H, "num_experts": E, "num_local_experts": E, "n_routed_experts": E}
    router = getattr(module, name)(SimpleNamespace(**shared | config)).eval()
    torch.manual_seed(3)
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_()
    return router


def rule_of(router, **block):
    """What the row says of a block with this router and these other parts."""
    rows = [(row, SimpleNamespace(**{row.router.at: router}, **block)) for row in FAMILIES]
    (spec,) = (
        row.router.spec(parts)
        for row, parts in rows
        if row.router.cls == type(router).__name__
        and all(at(parts, path) in allowed for path, allowed in row.when)
    )
    return spec


def dense(weights, ids, width=E):
    """[T, width] of weights by expert: which order the slots are in does not matter."""
    return torch.zeros(len(ids), width).scatter_add_(1, ids.long().clamp_min(0), weights.float())


def check(logits, weights, ids, spec, tensors=None, width=E):
    result = route(logits, spec, tensors)
    torch.testing.assert_close(
        dense(result.topk_weights, result.topk_ids, width),
        dense(weights, ids, width),
        rtol=1e-5,
        atol=1e-6,
    )
    return result


@pytest.fixture
def hidden():
    torch.manual_seed(4)
    return torch.randn(T, H)


@torch.no_grad()
def test_mixtral(hidden):
    router = router_of("mixtral", "MixtralTopKRouter", num_experts_per_tok=2)
    check(*router(hidden), rule_of(router))


@torch.no_grad()
@pytest.mark.parametrize("renormalize", [True, False])
def test_qwen3_moe(hidden, renormalize):
    router = router_of(
        "qwen3_moe", "Qwen3MoeTopKRouter", num_experts_per_tok=4, norm_topk_prob=renormalize
    )
    check(*router(hidden), rule_of(router))


@torch.no_grad()
def test_deepseek_v2(hidden):
    router = router_of(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        num_experts_per_tok=3,
        routed_scaling_factor=16.0,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
    )
    check(*router(hidden), rule_of(router))


@torch.no_grad()
def test_deepseek_v3(hidden):
    router = router_of(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
    )
    tensors = RoutingTensors(correction_bias=router.e_score_correction_bias)
    check(*router(hidden), rule_of(router), tensors)


@torch.no_grad()
def test_deepseek_v4_with_and_without_hash(hidden):
    config = {"num_experts_per_tok": 4, "routed_scaling_factor": 1.5, "vocab_size": 50}
    config["scoring_func"] = "sqrtsoftplus"
    router = router_of("deepseek_v4", "DeepseekV4TopKRouter", **config)
    tensors = RoutingTensors(correction_bias=router.e_score_correction_bias)
    check(*router(hidden), rule_of(router), tensors)
    hashed = router_of("deepseek_v4", "DeepseekV4HashRouter", **config)
    hashed.tid2eid.copy_(torch.randint(0, E, (50, 4)))
    tokens = torch.randint(0, 50, (T,))
    logits, weights, ids = hashed(hidden, tokens)
    tensors = RoutingTensors(hash_indices_table=hashed.tid2eid)
    result = route(logits, rule_of(hashed), tensors, input_ids=tokens)
    assert torch.equal(result.topk_ids.long(), ids)
    torch.testing.assert_close(result.topk_weights, weights)


@torch.no_grad()
def test_ernie(hidden):
    router = router_of(
        "ernie4_5_moe", "Ernie4_5_MoeTopKRouter", num_experts_per_tok=3, moe_norm_min=0.3
    )
    bias = router.moe_statics.e_score_correction_bias
    assert bias.shape == (1, E)
    tensors = RoutingTensors(correction_bias=bias)
    check(*router(hidden), rule_of(router), tensors)


@torch.no_grad()
def test_phimoe(hidden):
    router = router_of(
        "phimoe",
        "PhimoeTopKRouter",
        num_experts_per_tok=2,
        router_jitter_noise=0.1,
        input_jitter_noise=0.0,
    )
    check(*router(hidden), rule_of(router))


@torch.no_grad()
def test_gpt_oss(hidden):
    router = router_of("gpt_oss", "GptOssTopKRouter", num_experts_per_tok=4)
    check(*router(hidden), rule_of(router))


@torch.no_grad()
def test_granite(hidden):
    router = router_of("granitemoe", "GraniteMoeTopKRouter", num_experts_per_tok=4)
    parts = router(hidden)  # from 5.18 on in the order of the others
    ids = next(part for part in parts if not part.is_floating_point())
    logits = next(part for part in parts if part.shape == (T, E))
    weights = next(part for part in parts if part is not logits and part is not ids)
    check(logits, weights, ids, rule_of(router))


@torch.no_grad()
def test_longcat(hidden):
    """Identity experts: what Transformers gives to ids >= E is our zero-expert weight."""
    router = router_of(
        "longcat_flash",
        "LongcatFlashTopkRouter",
        num_experts_per_tok=5,
        zero_expert_num=8,
        routed_scaling_factor=6.0,
        router_bias=False,
    )
    router.e_score_correction_bias.mul_(0.05)
    *_, weights, ids = router(hidden)  # from 5.18 on behind the logits
    real = ids < E
    assert real.any() and not real.all()  # noqa: PT018
    logits = hidden @ router.classifier.weight.T
    tensors = RoutingTensors(correction_bias=router.e_score_correction_bias)
    result = check(
        logits,
        weights.masked_fill(~real, 0.0),
        ids.masked_fill(~real, 0),
        rule_of(router, experts=SimpleNamespace(num_routed_experts=E, zero_expert_num=8)),
        tensors,
    )
    zero = weights.masked_fill(real, 0.0).sum(dim=1)
    torch.testing.assert_close(result.zero_expert_weight, zero)


@torch.no_grad()
def test_llama4(hidden):
    """Transformers multiplies every expert's input by sigmoid, of -inf for the others."""
    router = router_of("llama4", "Llama4Router", num_experts_per_tok=1)
    scores, logits = router(hidden)
    result = route(logits, rule_of(router))
    torch.testing.assert_close(dense(result.topk_weights, result.topk_ids), scores)


@torch.no_grad()
@pytest.mark.parametrize("p", [None, 1.0, 2.0])
def test_dbrx(p):
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    logits = torch.randn(T, E)
    experts = SimpleNamespace(num_experts=E)
    ffn = SimpleNamespace(moe_normalize_expert_weights=p, top_k=4, experts=experts)
    weights, ids = DbrxFFN.route_tokens_to_experts(ffn, logits)
    (row,) = (row for row in FAMILIES if row.block == DbrxFFN.__name__)
    check(logits, weights, ids, row.router.spec(ffn))


@torch.no_grad()
@pytest.mark.parametrize(
    ("score_function", "renormalize"), [("sigmoid", True), ("sigmoid", False), ("softmax", True)]
)
def test_cohere2(hidden, score_function, renormalize):
    router = router_of(
        "cohere2_moe",
        "Cohere2MoeTopKRouter",
        num_experts_per_tok=3,
        expert_selection_fn=score_function,
        norm_topk_prob=renormalize,
    )
    check(*router(hidden), rule_of(router, shared_expert_combination_strategy="sum"))


@torch.no_grad()
def test_gemma4(hidden):
    router = router_of("gemma4", "Gemma4TextRouter", top_k_experts=3, rms_norm_eps=1e-6)
    _, weights, ids = router(hidden)
    logits = router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)
    tensors = RoutingTensors(per_expert_scale=router.per_expert_scale)
    row = next(row for row in FAMILIES if row.module == "gemma4")
    check(logits, weights, ids, row.router.spec(SimpleNamespace(router=router)), tensors)


@torch.no_grad()
def test_laguna_softcap(hidden):
    """Grok's tanh cap, in the one family of Transformers that has it (with sigmoid and bias)."""
    router = router_of(
        "laguna", "LagunaTopKRouter", num_experts_per_tok=3, moe_router_logit_softcapping=2.0
    )
    _, weights, ids = router(hidden)
    spec = rule_of(router, routed_scaling_factor=1.0)
    assert spec.logit_softcap == 2.0
    tensors = RoutingTensors(correction_bias=router.e_score_correction_bias)
    check(hidden @ router.weight.T, weights, ids, spec, tensors)
