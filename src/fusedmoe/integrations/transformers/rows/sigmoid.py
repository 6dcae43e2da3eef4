"""Sigmoid (or sqrt-softplus) scores of all experts, mostly with a bias for the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fusedmoe.integrations.transformers.families import (
    INPUT_IDS,
    Experts,
    Family,
    Setting,
    by_best_groups,
    family,
    read,
    rule_of,
)


def _softcap(block: Any) -> float:
    return max(block.gate.router_logit_softcapping, 0.0)


_GATE_BIAS = "gate.e_score_correction_bias"
_OWN_BIAS: dict[str, Any] = {  # the block's, which it hands to its router
    "correction_bias": "e_score_correction_bias",
    "arguments": ("e_score_correction_bias",),
}


def _deepseek_v3(
    module: str, prefix: str, block: str = "MoE", shared: str | None = "shared_experts", **more: Any
) -> Family:
    return family(
        module,
        prefix,
        by_best_groups(
            score_function="sigmoid",
            renormalize=read("gate.norm_topk_prob"),
            routed_scaling_factor=read("gate.routed_scaling_factor"),
        ),
        block=block,
        router="TopkRouter",
        fp32_logits=True,
        correction_bias=_GATE_BIAS,
        shared=shared,
        **more,
    )


def _sigmoid(gate: str, epsilon: float, **fields: Setting) -> Mapping[str, Setting]:
    return rule_of(
        gate, score_function="sigmoid", renormalize=True, renormalize_epsilon=epsilon, **fields
    )


SIGMOID = (
    _deepseek_v3("deepseek_v3", "DeepseekV3"),
    _deepseek_v3("deepseek_v32", "DeepseekV32"),
    _deepseek_v3("glm4_moe", "Glm4Moe"),
    _deepseek_v3("glm4_moe_lite", "Glm4MoeLite"),
    _deepseek_v3("glm4v_moe", "Glm4vMoeText"),
    _deepseek_v3("glm_moe_dsa", "GlmMoeDsa"),
    _deepseek_v3("glm5_next", "Glm5NextText"),
    _deepseek_v3("dots1", "Dots1"),
    replace(_deepseek_v3("dots3_note", "Dots3NoteText"), experts=Experts(cls="Dots3NoteExperts")),
    _deepseek_v3("bailing_hybrid", "BailingHybrid"),
    _deepseek_v3("hy_v4", "HYV4"),
    _deepseek_v3("kimi_linear", "KimiLinear"),
    _deepseek_v3("solar_open", "SolarOpen"),
    _deepseek_v3("exaone_moe", "ExaoneMoe", block="SparseMoEBlock"),
    _deepseek_v3("mimo_v2_flash", "MiMoV2Flash", shared=None),
    _deepseek_v3("axk1", "AXK1", output_norm="post_mlp_layernorm"),
    _deepseek_v3("axk2", "AXK2", when=(("gate.num_group", (None, 1)),)),
    # Groups here leave their experts a choice score of 0, which can beat a negative one.
    family(
        "axk2",
        "AXK2",
        rule_of("gate"),
        block="MoE",
        router="TopkRouter",
        decides=True,
        shared="shared_experts",
    ),
    _deepseek_v3(
        "nemotron_h",
        "NemotronH",
        experts={"w13": "up_proj"},
        input_projection="fc1_latent_proj",
        output_projection="fc2_latent_proj",
    ),
    *(
        family(
            "deepseek_v4",
            "DeepseekV4",
            rule_of(
                "gate",
                score_function="sqrtsoftplus",
                renormalize=True,
                renormalize_epsilon=1e-20,
                routed_scaling_factor=read("gate.routed_scaling_factor"),
            ),
            router=router,
            correction_bias=bias,
            hash_table=table,
            arguments=arguments,
            shared="shared_experts",
            takes_input_ids=True,
            when=(("gate.score_fn.__class__.__name__", ("SqrtSoftplusActivation",)),),
        )
        for router, bias, table, arguments in (
            ("TopKRouter", _GATE_BIAS, None, ()),
            ("HashRouter", None, "gate.tid2eid", (INPUT_IDS,)),
        )
    ),
    family(
        "afmoe",
        "Afmoe",
        _sigmoid("router", 1e-20, routed_scaling_factor=read("router.route_scale")),
        router="TokenChoiceRouter",
        at="router",
        weight="gate.weight",
        correction_bias="expert_bias",
        arguments=("expert_bias",),
        takes_3d=True,
        shared="shared_experts",
    ),
    family(
        "beam",
        "Beam",
        by_best_groups(score_function="sigmoid", renormalize=read("gate.norm_topk_prob")),
        block="MoE",
        fp32_logits=True,
        correction_bias=_GATE_BIAS,
        output_scale=read("routed_scaling_factor"),
    ),
    family(
        "flint",
        "Flint",
        rule_of("gate", score_function="sigmoid", renormalize=read("gate.norm_topk_prob")),
        fp32_logits=True,
        shared="shared_expert",
    ),
    # Chosen by logits and a bias, weighted by the logits' sigmoid.
    family("kolibri1", "Kolibri1", rule_of("gate"), decides=True, shared="shared_experts"),
    family(
        "hy_v3",
        "HYV3",
        _sigmoid("gate", 1e-20, routed_scaling_factor=read("gate.router_scaling_factor")),
        block="MoE",
        fp32_logits=True,
        **_OWN_BIAS,
        shared="shared_experts",
    ),
    *(
        family(
            "lfm2_moe",
            "Lfm2Moe",
            rule_of(
                "gate",
                score_function="sigmoid",
                renormalize=read("gate.norm_topk_prob"),
                renormalize_epsilon=1e-6,
                routed_scaling_factor=read("gate.routed_scaling_factor"),
            ),
            correction_bias=bias,
            arguments=() if bias is None else (bias,),
            when=(("use_expert_bias", (bias is not None,)),),
        )
        for bias in ("expert_bias", None)
    ),
    family("minimax_m2", "MiniMaxM2", _sigmoid("gate", 0.0), **_OWN_BIAS, noisy=True),
    *(
        family(
            module,
            prefix,
            _sigmoid("gate", 0.0, routed_scaling_factor=read("routed_scaling_factor")),
            correction_bias=_GATE_BIAS,
            shared="shared_experts",
        )
        for module, prefix in (("minimax_m3_vl", "MiniMaxM3VL"), ("step3p7", "Step3p7"))
    ),
    family(
        "laguna",
        "Laguna",
        _sigmoid(
            "gate",
            0.0,
            routed_scaling_factor=read("routed_scaling_factor"),
            logit_softcap=_softcap,
        ),
        correction_bias=_GATE_BIAS,
        shared="shared_experts",
    ),
)
