"""Sigmoid (or sqrt-softplus) scores of all experts, mostly with a bias for the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedmoe.integrations.transformers.families import (
    INPUT_IDS,
    Experts,
    Family,
    Router,
    Setting,
    by_best_groups,
    read,
    rule_of,
)


def _softcap(block: Any) -> float:
    return max(block.gate.router_logit_softcapping, 0.0)


def _deepseek_v3(
    module: str, prefix: str, block: str = "MoE", shared: str | None = "shared_experts", **more: Any
) -> Family:
    more.setdefault("experts", Experts(cls=f"{prefix}Experts"))
    return Family(
        module=module,
        block=f"{prefix}{block}",
        router=Router(
            cls=f"{prefix}TopkRouter",
            rule=by_best_groups(
                score_function="sigmoid",
                renormalize=read("gate.norm_topk_prob"),
                routed_scaling_factor=read("gate.routed_scaling_factor"),
            ),
            fp32_logits=True,
            correction_bias="gate.e_score_correction_bias",
        ),
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
    _deepseek_v3("dots3_note", "Dots3NoteText", experts=Experts(cls="Dots3NoteExperts")),
    _deepseek_v3("bailing_hybrid", "BailingHybrid"),
    _deepseek_v3("hy_v4", "HYV4"),
    _deepseek_v3("kimi_linear", "KimiLinear"),
    _deepseek_v3("solar_open", "SolarOpen"),
    _deepseek_v3("exaone_moe", "ExaoneMoe", block="SparseMoEBlock"),
    _deepseek_v3("mimo_v2_flash", "MiMoV2Flash", shared=None),
    _deepseek_v3("axk1", "AXK1", output_norm="post_mlp_layernorm"),
    _deepseek_v3("axk2", "AXK2", when=(("gate.num_group", (None, 1)),)),
    # Groups here leave their experts a choice score of 0, which can beat a negative one.
    Family(
        module="axk2",
        block="AXK2MoE",
        router=Router(cls="AXK2TopkRouter", rule=rule_of("gate"), decides=True),
        experts=Experts(cls="AXK2Experts"),
        shared="shared_experts",
    ),
    _deepseek_v3(
        "nemotron_h",
        "NemotronH",
        experts=Experts(cls="NemotronHExperts", w13="up_proj"),
        input_projection="fc1_latent_proj",
        output_projection="fc2_latent_proj",
    ),
    *(
        Family(
            module="deepseek_v4",
            block="DeepseekV4SparseMoeBlock",
            router=Router(
                cls=router,
                rule=rule_of(
                    "gate",
                    score_function="sqrtsoftplus",
                    renormalize=True,
                    renormalize_epsilon=1e-20,
                    routed_scaling_factor=read("gate.routed_scaling_factor"),
                ),
                correction_bias=bias,
                hash_table=table,
                arguments=arguments,
            ),
            experts=Experts(cls="DeepseekV4Experts"),
            shared="shared_experts",
            takes_input_ids=True,
            when=(("gate.score_fn.__class__.__name__", ("SqrtSoftplusActivation",)),),
        )
        for router, bias, table, arguments in (
            ("DeepseekV4TopKRouter", "gate.e_score_correction_bias", None, ()),
            ("DeepseekV4HashRouter", None, "gate.tid2eid", (INPUT_IDS,)),
        )
    ),
    Family(
        module="afmoe",
        block="AfmoeSparseMoeBlock",
        router=Router(
            cls="AfmoeTokenChoiceRouter",
            at="router",
            rule=_sigmoid("router", 1e-20, routed_scaling_factor=read("router.route_scale")),
            weight="gate.weight",
            correction_bias="expert_bias",
            arguments=("expert_bias",),
            takes_3d=True,
        ),
        experts=Experts(cls="AfmoeExperts"),
        shared="shared_experts",
    ),
    Family(
        module="beam",
        block="BeamMoE",
        router=Router(
            cls="BeamTopKRouter",
            rule=by_best_groups(score_function="sigmoid", renormalize=read("gate.norm_topk_prob")),
            fp32_logits=True,
            correction_bias="gate.e_score_correction_bias",
        ),
        experts=Experts(cls="BeamExperts"),
        output_scale=read("routed_scaling_factor"),
    ),
    Family(
        module="flint",
        block="FlintSparseMoeBlock",
        router=Router(
            cls="FlintTopKRouter",
            rule=rule_of("gate", score_function="sigmoid", renormalize=read("gate.norm_topk_prob")),
            fp32_logits=True,
        ),
        experts=Experts(cls="FlintExperts"),
        shared="shared_expert",
    ),
    Family(  # chosen by logits and a bias, weighted by the logits' sigmoid
        module="kolibri1",
        block="Kolibri1SparseMoeBlock",
        router=Router(cls="Kolibri1TopKRouter", rule=rule_of("gate"), decides=True),
        experts=Experts(cls="Kolibri1Experts"),
        shared="shared_experts",
    ),
    Family(
        module="hy_v3",
        block="HYV3MoE",
        router=Router(
            cls="HYV3TopKRouter",
            rule=_sigmoid("gate", 1e-20, routed_scaling_factor=read("gate.router_scaling_factor")),
            fp32_logits=True,
            correction_bias="e_score_correction_bias",
            arguments=("e_score_correction_bias",),
        ),
        experts=Experts(cls="HYV3Experts"),
        shared="shared_experts",
    ),
    *(
        Family(
            module="lfm2_moe",
            block="Lfm2MoeSparseMoeBlock",
            router=Router(
                cls="Lfm2MoeTopKRouter",
                rule=rule_of(
                    "gate",
                    score_function="sigmoid",
                    renormalize=read("gate.norm_topk_prob"),
                    renormalize_epsilon=1e-6,
                    routed_scaling_factor=read("gate.routed_scaling_factor"),
                ),
                correction_bias=bias,
                arguments=() if bias is None else (bias,),
            ),
            experts=Experts(cls="Lfm2MoeExperts"),
            when=(("use_expert_bias", (bias is not None,)),),
        )
        for bias in ("expert_bias", None)
    ),
    Family(
        module="minimax_m2",
        block="MiniMaxM2SparseMoeBlock",
        router=Router(
            cls="MiniMaxM2TopKRouter",
            rule=_sigmoid("gate", 0.0),
            correction_bias="e_score_correction_bias",
            arguments=("e_score_correction_bias",),
        ),
        experts=Experts(cls="MiniMaxM2Experts"),
        noisy=True,
    ),
    *(
        Family(
            module=module,
            block=f"{prefix}SparseMoeBlock",
            router=Router(
                cls=f"{prefix}TopKRouter",
                rule=_sigmoid("gate", 0.0, routed_scaling_factor=read("routed_scaling_factor")),
                correction_bias="gate.e_score_correction_bias",
            ),
            experts=Experts(cls=f"{prefix}Experts"),
            shared="shared_experts",
        )
        for module, prefix in (("minimax_m3_vl", "MiniMaxM3VL"), ("step3p7", "Step3p7"))
    ),
    Family(
        module="laguna",
        block="LagunaSparseMoeBlock",
        router=Router(
            cls="LagunaTopKRouter",
            rule=_sigmoid(
                "gate",
                0.0,
                routed_scaling_factor=read("routed_scaling_factor"),
                logit_softcap=_softcap,
            ),
            correction_bias="gate.e_score_correction_bias",
        ),
        experts=Experts(cls="LagunaExperts"),
        shared="shared_experts",
    ),
)
