"""Softmax over all experts, then the best K."""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.integrations.transformers.families import (
    Experts,
    Family,
    Router,
    by_best_groups,
    family,
    read,
    rule_of,
)

GATED_SHARED: dict[str, Any] = {"shared": "shared_expert", "shared_gate": "shared_expert_gate"}


def _has_norm(block: Any) -> bool:
    return block.moe_normalize_expert_weights is not None


def _gemma_input(router: Any, x: torch.Tensor) -> torch.Tensor:
    return router.norm(x) * router.scale * router.scalar_root_size


_NORM_IF_ASKED = rule_of("gate", renormalize=read("gate.norm_topk_prob"))
_ALWAYS_NORM = rule_of("gate", renormalize=True)


SOFTMAX = (
    family("mixtral", "Mixtral", _ALWAYS_NORM, noisy=True),
    family("minimax", "MiniMax", _ALWAYS_NORM, noisy=True),
    family("qwen2_moe", "Qwen2Moe", _NORM_IF_ASKED, **GATED_SHARED),
    family("qwen3_moe", "Qwen3Moe", _NORM_IF_ASKED),
    family("qwen3_next", "Qwen3Next", _NORM_IF_ASKED, **GATED_SHARED),
    family("qwen3_5_moe", "Qwen3_5Moe", _ALWAYS_NORM, **GATED_SHARED),
    family("qwen4_exp", "Qwen4ExpText", _NORM_IF_ASKED, **GATED_SHARED),
    family("qwen3_vl_moe", "Qwen3VLMoeText", _ALWAYS_NORM),
    family("qwen3_omni_moe", "Qwen3OmniMoeThinkerText", _NORM_IF_ASKED),
    family("qwen3_omni_moe", "Qwen3OmniMoeTalkerText", _NORM_IF_ASKED, **GATED_SHARED),
    family("olmoe", "Olmoe", _NORM_IF_ASKED),
    family("flex_olmo", "FlexOlmo", _NORM_IF_ASKED),
    family("mellum", "Mellum", _NORM_IF_ASKED),
    family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1",
        _ALWAYS_NORM,
        block="Moe",
        router="Gate",
        weight="wg.weight",
        shared="shared_mlp",
    ),
    family("jamba", "Jamba", rule_of("router"), at="router"),
    Family(  # as older releases have it
        module="jamba",
        block="JambaSparseMoeBlock",
        router=Router(
            cls="Linear",
            at="router",
            rule={"top_k": read("top_k"), "num_experts": read("num_experts")},
        ),
        experts=Experts(cls="JambaExperts"),
    ),
    family(
        "dbrx",
        "Dbrx",
        {
            "top_k": read("top_k"),
            "num_experts": read("experts.num_experts"),
            "renormalize": _has_norm,
            "renormalize_norm": read("moe_normalize_expert_weights"),
        },
        block="FFN",
        router="Router",
        at="router",
        weight="layer.weight",
        experts={
            "w13": ("mlp.w1", "mlp.v1"),
            "w2": "mlp.w2",
            "layout": "rows",
            "activation": read("mlp.activation_fn"),
        },
        noisy=True,
    ),
    family(
        "longcat_flash",
        "LongcatFlash",
        {
            "top_k": read("router.top_k"),
            "num_experts": read("experts.num_routed_experts"),
            "num_zero_experts": read("experts.zero_expert_num"),
            "routed_scaling_factor": read("router.routed_scaling_factor"),
        },
        block="MoE",
        router="TopkRouter",
        at="router",
        weight="classifier.weight",
        fp32_logits=True,
        correction_bias="router.e_score_correction_bias",
        returned=(None, 0, 1),
        experts={"activation": read("act_fn")},
    ),
    *(
        family(
            module,
            prefix,
            by_best_groups(
                renormalize=renormalize,
                routed_scaling_factor=read("gate.routed_scaling_factor"),
            ),
            block="MoE",
            router="TopkRouter",
            fp32_logits=fp32_logits,
            shared="shared_experts",
        )
        for module, prefix, renormalize, fp32_logits in (
            ("mistral4", "Mistral4", read("gate.norm_topk_prob"), False),
            ("mistral_large4", "MistralLarge4Text", True, True),
        )
    ),
    *(
        family(
            module,
            prefix,
            rule_of("gate", routed_scaling_factor=read("gate.routed_scaling_factor"), **groups),
            block="Moe",
            router="TopkRouter",
            fp32_logits=True,
            when=(("gate.topk_method", (method,)),),
            shared="shared_experts",
        )
        for module, prefix in (
            ("deepseek_v2", "DeepseekV2"),
            ("deepseek_ocr2", "DeepseekOcr2Text"),
            ("unlimited_ocr", "UnlimitedOcrText"),
        )
        for method, groups in (
            ("greedy", {}),
            (
                "group_limited_greedy",
                {"num_expert_group": read("gate.num_group"), "topk_group": read("gate.topk_group")},
            ),
        )
    ),
    family(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        rule_of("gate", renormalize=True, renormalize_floor=read("gate.norm_min")),
        fp32_logits=True,
        correction_bias="gate.moe_statics.e_score_correction_bias",
        shared="shared_experts",
    ),
    # The block around the text and the vision experts keeps its own forward.
    Family(
        module="ernie4_5_vl_moe",
        block="Ernie4_5_VLMoeSparseMoeBlock",
        router=Router(
            cls="Ernie4_5_VLMoeMoeTopKRouter",
            rule=rule_of("gate", renormalize=True, renormalize_floor=read("gate.norm_min")),
            fp32_logits=True,
            correction_bias="gate.moe_statics.e_score_correction_bias",
        ),
        experts=Experts(cls="Ernie4_5_VLMoeMoeExperts"),
        returns="flattened_and_logits",
    ),
    *(
        Family(
            module=module,
            block=block,
            router=Router(
                cls=f"{prefix}Router",
                at="router",
                rule={
                    "top_k": read("router.config.top_k_experts"),
                    "num_experts": read("router.config.num_experts"),
                    "renormalize": True,
                },
                weight="proj.weight",
                transform=_gemma_input,
                per_expert_scale="router.per_expert_scale",
            ),
            experts=Experts(cls=f"{prefix}Experts"),
            whole=False,
        )
        for module, prefix, block in (
            ("gemma4", "Gemma4Text", "Gemma4TextDecoderLayer"),
            ("diffusion_gemma", "DiffusionGemmaText", "DiffusionGemmaEncoderTextLayer"),
            ("diffusion_gemma", "DiffusionGemmaText", "DiffusionGemmaDecoderTextLayer"),
        )
    ),
    # Not in Transformers: the port that Grok-1's checkpoint is read with.
    Family(
        module="modeling_grok1",
        block="MoeBlock",
        router=Router(
            cls="Linear", rule={"top_k": read("top_k"), "num_experts": read("num_experts")}
        ),
        experts=Experts(cls="ModuleList", layout="list"),
        returns="hidden_and_logits",
    ),
)
