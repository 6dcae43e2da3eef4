"""The best K logits, then a score of the chosen ones."""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.integrations.transformers.families import (
    Experts,
    Family,
    Router,
    family,
    read,
    rule_of,
)


def _one_over_top_k(block: Any) -> float:
    return 1 / block.router.top_k


def _average_with_shared(block: Any) -> float:
    return 0.5 if block.num_shared_experts > 0 else 1.0


def _silu(experts: Any) -> Any:
    return torch.nn.functional.silu


_CHOSEN_SOFTMAX = rule_of("router", score_after_topk=True)


_TRANSPOSED_WITH_BIAS = {
    "w13_bias": "gate_up_proj_bias",
    "w2_bias": "down_proj_bias",
    "layout": "transposed",
}


def _granite(module: str, prefix: str, returned: tuple[int, int, int] = (2, 1, 0)) -> Family:
    return family(module, prefix, _CHOSEN_SOFTMAX, block="MoE", at="router", returned=returned)


LOGITS_FIRST = (
    family(
        "gpt_oss",
        "GptOss",
        _CHOSEN_SOFTMAX,
        block="MLP",
        at="router",
        bias="bias",
        experts=_TRANSPOSED_WITH_BIAS,
        returns="hidden_and_weights",
    ),
    family(
        "openai_privacy_filter",
        "OpenAIPrivacyFilter",
        rule_of("router", score_after_topk=True, routed_scaling_factor=_one_over_top_k),
        block="MLP",
        at="router",
        bias="bias",
        fp32_logits=True,
        experts=_TRANSPOSED_WITH_BIAS,
        output_scale=read("num_experts"),
        returns="hidden_and_weights",
    ),
    _granite("granitemoe", "GraniteMoe"),
    _granite("granitemoeshared", "GraniteMoeShared"),
    _granite("granitemoehybrid", "GraniteMoeHybrid"),
    _granite("granitemoe_swa", "GraniteMoeSWA", returned=(0, 1, 2)),
    Family(
        module="llama4",
        block="Llama4TextMoe",
        router=Router(
            cls="Llama4Router",
            at="router",
            rule=rule_of("router", score_function="sigmoid", score_after_topk=True),
            returned=(1, None, None),
        ),
        experts=Experts(cls="Llama4TextExperts", layout="transposed", activation=read("act_fn")),
        shared="shared_expert",
        weights_on_input=True,
        returns="flat_and_logits",
        when=(("router.top_k", (1,)),),
    ),
    Family(
        module="aria",
        block="AriaTextMoELayer",
        router=Router(cls="AriaTextTopKRouter", at="router", rule=_CHOSEN_SOFTMAX),
        experts=Experts(cls="AriaExperts", layout="transposed"),
        shared="shared_experts",
    ),
    Family(  # as older releases have it
        module="aria",
        block="AriaTextMoELayer",
        router=Router(
            cls="Linear",
            at="router",
            rule={
                "top_k": read("config.moe_topk"),
                "num_experts": read("config.moe_num_experts"),
                "score_after_topk": True,
            },
        ),
        experts=Experts(
            cls="AriaExperts",
            w13="fc1.weight",
            w2="fc2.weight",
            layout="transposed",
            activation=_silu,
        ),
        shared="shared_experts",
    ),
    Family(
        module="jetmoe",
        block="JetMoeMoE",
        router=Router(
            cls="JetMoeTopKGating",
            at="router",
            rule=_CHOSEN_SOFTMAX,
            weight="layer.weight",
            returned=(4, None, None),
        ),
        experts=Experts(
            cls="JetMoeMoE",
            at="",
            w13="input_linear.weight",
            w2="output_linear.weight",
            activation=read("activation"),
        ),
        output_bias="bias",
    ),
    *(
        family(
            "cohere2_moe",
            "Cohere2Moe",
            rule_of("gate", **rule),
            shared="shared_experts",
            output_scale=scale,
            when=(
                ("gate.expert_selection_fn", (score,)),
                ("shared_expert_combination_strategy", (combination,)),
            ),
        )
        for score, rule in (
            ("softmax", {"score_after_topk": True}),
            (
                "sigmoid",
                {
                    "score_function": "sigmoid",
                    "score_after_topk": True,
                    "renormalize": read("gate.norm_topk_prob"),
                },
            ),
        )
        for combination, scale in (("sum", 1.0), ("average", _average_with_shared))
    ),
    family(
        "phimoe",
        "Phimoe",
        rule_of(
            "router",
            selection="sparsemixer",
            sparsemixer_epsilon=read("router.router_jitter_noise"),
        ),
        at="router",
        noisy=True,
    ),
)
