"""The grid of rules that the reference, the Triton kernel and the GPU are tested on."""

from dataclasses import dataclass, field
from typing import Any

import torch

from fusedmoe.router.spec import RoutingSpec, RoutingTensors

VOCABULARY = 20
VISION_LO = 12


@dataclass(frozen=True)
class Case:
    """A rule, its tensors by name, and the rows it is tried on."""

    name: str
    spec: RoutingSpec
    tensors: tuple[str, ...] = ()
    padding: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def rule(name: str, top_k: int, num_experts: int, *tensors: str, padding=False, **fields) -> Case:
    spec = RoutingSpec(top_k=top_k, num_experts=num_experts, **fields)
    return Case(name, spec, tensors, padding)


V3 = {"score_function": "sigmoid", "renormalize": True, "group_score": "top2_sum"}

CASES = [
    rule("softmax", 2, 8),
    rule("softmax_renormalized", 8, 60, renormalize=True),
    rule("every_expert", 7, 7, renormalize=True),
    rule("one_expert", 1, 1),
    rule("many_picks", 32, 48, renormalize=True),
    rule("thousand_experts", 5, 1024, renormalize=True),
    rule("sigmoid", 3, 24, score_function="sigmoid"),
    rule("sigmoid_renormalized", 3, 24, score_function="sigmoid", renormalize=True),
    rule("sqrtsoftplus", 6, 33, score_function="sqrtsoftplus", renormalize=True),
    rule("identity", 2, 9, score_function="identity"),
    rule("identity_renormalized", 4, 9, score_function="identity", renormalize=True),
    rule("gpt_oss", 4, 32, score_after_topk=True),
    rule("llama4", 1, 16, score_function="sigmoid", score_after_topk=True),
    rule("cohere2", 3, 16, score_function="sigmoid", score_after_topk=True, renormalize=True),
    rule("after_sqrtsoftplus", 3, 16, score_function="sqrtsoftplus", score_after_topk=True),
    rule("after_identity", 3, 16, score_function="identity", score_after_topk=True),
    rule("bias_softmax", 4, 20, "bias", routed_scaling_factor=2.5),
    rule("bias_after_topk", 4, 20, "bias", score_after_topk=True),
    rule("minimax_m2", 4, 20, "bias", score_function="sigmoid", renormalize=True),
    rule("deepseek_v2", 6, 20, num_expert_group=4, topk_group=2, routed_scaling_factor=16.0),
    rule("deepseek_v3", 4, 24, "bias", num_expert_group=4, topk_group=2, **V3),
    rule("deepseek_v3_160_experts", 6, 160, "bias", num_expert_group=8, topk_group=3, **V3),
    rule("groups_of_one", 2, 6, "bias", num_expert_group=6, topk_group=3, **V3),
    rule("groups_too_small", 5, 12, "bias", num_expert_group=4, topk_group=1, **V3),
    rule("one_group", 3, 12, "bias", num_expert_group=1, topk_group=1, **V3),
    rule(
        "groups_of_three_all_negative",
        3,
        12,
        "negative",
        score_function="sigmoid",
        num_expert_group=4,
        topk_group=2,
    ),
    rule("infinite_biases", 4, 12, "infinite", num_expert_group=3, topk_group=2, **V3),
    rule("group_max_bias", 3, 12, "bias", num_expert_group=3, topk_group=2),
    rule("ernie", 3, 12, "bias", renormalize=True, renormalize_floor=0.5),
    rule("renormalize_epsilon", 3, 12, renormalize=True, renormalize_epsilon=0.25),
    rule("dbrx_norm_2", 4, 16, renormalize=True, renormalize_norm=2.0),
    rule("norm_3", 4, 16, renormalize=True, renormalize_norm=3.0),
    rule("norm_infinity", 4, 16, renormalize=True, renormalize_norm=float("inf")),
    rule("grok", 2, 8, logit_softcap=0.75),
    rule("gemma4", 4, 16, "scale", renormalize=True),
    rule("phimoe", 2, 16, selection="sparsemixer", sparsemixer_epsilon=0.2),
    rule("phimoe_capped", 2, 5, "scale", selection="sparsemixer", logit_softcap=2.0),
    rule(
        "interns1_pro",
        6,
        24,
        selection="topk_per_group",
        num_expert_group=3,
        topk_group=3,
        renormalize=True,
    ),
    rule("longcat", 5, 14, "bias", num_zero_experts=6, routed_scaling_factor=6.0),
    rule("longcat_scaled", 5, 14, "bias", "scale", num_zero_experts=6, renormalize=True),
    rule("shared", 2, 8, num_fused_shared_experts=2, shared_expert_weight=0.4, padding=True),
    rule(
        "zero_and_shared",
        3,
        8,
        "bias",
        num_zero_experts=4,
        num_fused_shared_experts=1,
        padding=True,
    ),
    rule("padding", 3, 10, renormalize=True, padding=True),
    rule("hash", 3, 10, "hash", score_function="sqrtsoftplus", renormalize=True),
    rule("hash_softmax", 3, 10, "hash", renormalize=True, padding=True),
    rule("hash_after_topk", 3, 10, "hash", score_after_topk=True),
    rule(
        "vision",
        3,
        10,
        "bias",
        "vision",
        score_function="sqrtsoftplus",
        renormalize=True,
        image_sentinel_lo=VISION_LO,
    ),
    rule(
        "vision_hash",
        3,
        10,
        "hash",
        "vision",
        score_function="sqrtsoftplus",
        image_sentinel_lo=VISION_LO,
        padding=True,
    ),
    rule("vision_off", 3, 10, "bias", "vision", image_sentinel_lo=0),
]


def make_tensors(case: Case, device: str = "cpu", seed: int = 0) -> RoutingTensors:
    gen = torch.Generator().manual_seed(seed + 1)
    spec = case.spec
    candidates = spec.num_experts + spec.num_zero_experts
    table = torch.randint(0, candidates, (VOCABULARY, spec.top_k), generator=gen)
    table[0, 0] = -1
    bias = torch.randn(candidates, generator=gen) * 0.3
    infinite = bias.clone()
    infinite[::5], infinite[1::4], infinite[2::9] = float("inf"), float("-inf"), float("nan")
    made = {
        "bias": ("correction_bias", bias),
        "negative": ("correction_bias", bias - 5),
        "infinite": ("correction_bias", infinite),
        "scale": ("per_expert_scale", torch.rand(spec.num_experts, generator=gen) + 0.5),
        "vision": ("vision_bias", torch.randn(candidates, generator=gen)),
        "hash": ("hash_indices_table", table),
    }
    wanted = (made[name] for name in case.tensors)
    return RoutingTensors(**{field: tensor.to(device) for field, tensor in wanted})


def make_rows(case: Case, num_tokens: int, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """input_ids and is_padding as the case wants them."""
    gen = torch.Generator().manual_seed(seed + 2)
    ids = (VISION_LO - 1, VISION_LO, VISION_LO + 4, VISION_LO + 5, 0, VOCABULARY - 1, 3)
    input_ids = torch.tensor(ids).repeat(num_tokens // len(ids) + 1)[:num_tokens]
    is_padding = torch.rand(num_tokens, generator=gen) < 0.3
    needs_ids = "hash" in case.tensors or "vision" in case.tensors
    return {
        "input_ids": input_ids.to(device) if needs_ids else None,
        "is_padding": is_padding.to(device) if case.padding else None,
    }


def make_logits(case: Case, num_tokens: int, seed: int = 0, kind: str = "random") -> torch.Tensor:
    """random: no two alike; ties: few distinct values; hostile: NaN and infinities among them."""
    gen = torch.Generator().manual_seed(seed)
    candidates = case.spec.num_experts + case.spec.num_zero_experts
    logits = torch.randn(num_tokens, candidates, generator=gen) * 2
    if kind != "random":
        logits = (logits * 2).round() / 2
    if kind == "hostile":
        place = torch.rand(logits.shape, generator=gen)
        logits[place < 0.15] = float("nan")
        logits[(place > 0.15) & (place < 0.25)] = float("inf")
        logits[(place > 0.25) & (place < 0.4)] = float("-inf")
        logits[::3] = torch.where(place[::3] < 0.4, float("-inf"), logits[::3].nan_to_num(0, 0, 0))
        if num_tokens > 3:
            logits[1], logits[3] = float("nan"), float("-inf")
    return logits
