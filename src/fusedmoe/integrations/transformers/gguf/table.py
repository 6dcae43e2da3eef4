"""The architectures whose GGUF files load as whole models: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedmoe.integrations.transformers.gguf.architecture import Architecture, shared_experts
from fusedmoe.integrations.transformers.gguf.header import (
    Header,
    attention_bias,
    partial_rope,
    plain_rope,
    smooth_rope,
)
from fusedmoe.integrations.transformers.gguf.steps import (
    Join,
    as_row,
    from_pairs,
    keys_and_values,
)

_EXPERTS = {"num_experts": "expert_count"}
_MOE_SIZES = {
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_HEAD_DIM = {"head_dim": "attention.key_length"}
_IN_PAIRS = {
    "attn_q": from_pairs("attention.head_count"),
    "attn_k": from_pairs("attention.head_count_kv"),
}

_QWEN = (
    Architecture(
        model_type="qwen2_moe",
        fields=_EXPERTS
        | _MOE_SIZES
        | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        defaults={"norm_topk_prob": False},
        names=shared_experts("mlp.shared_expert")
        | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
        turned={"ffn_gate_inp_shexp": as_row},
    ),
    Architecture(
        model_type="qwen3_moe",
        fields=_EXPERTS | _MOE_SIZES | _HEAD_DIM,
        defaults={"norm_topk_prob": True, "head_dim": None},
    ),
)

_DEEPSEEK_EXPERTS = _MOE_SIZES | {
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
_DEEPSEEK_DEFAULTS = {
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "n_group": 1,
    "topk_group": 1,
}
_CHOICE_BIAS = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}


def _latent_attention(header: Header) -> Mapping[str, Any]:
    """Sizes of heads; newer files give those of the latent where older ones give these."""
    for key in ("attention.temperature_scale", "attention.temperature_length"):
        if header.get(key) is not None:
            raise header.wrong(key)
    turned = header.number("rope.dimension_count")
    key_length, value_length = (
        header.number(f"attention.{name}_length_mla", header.number(f"attention.{name}_length"))
        for name in ("key", "value")
    )
    return {
        "num_key_value_heads": header.number("attention.head_count"),
        "q_lora_rank": header.value("attention.q_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key_length - turned,
        "v_head_dim": value_length,
    }


def _deepseek_v2(header: Header) -> Mapping[str, Any]:
    if header.value("expert_weights_norm"):
        raise header.wrong("expert_weights_norm")
    groups = header.number("expert_group_count", 1)
    method = "greedy" if groups == 1 else "group_limited_greedy"
    return {**_latent_attention(header), "topk_method": method}


def _deepseek_rope(header: Header) -> dict[str, Any]:
    """YaRN that leaves cosines as they are, and scales scores instead."""
    found = plain_rope(header)
    if found["rope_type"] != "yarn":
        return found
    scale = 10 * header.number("rope.scaling.yarn_log_multiplier", 0.0)
    return found | {"attention_factor": 1.0, "mscale": scale, "mscale_all_dim": scale}


def _glm4_moe(header: Header) -> Mapping[str, Any]:
    return {**attention_bias(header), "use_qk_norm": header.has("blk.0.attn_q_norm.weight")}


def _is_sigmoid(header: Header) -> bool:
    """Where the header does not say it, a bias for the choice does."""
    function = header.get("expert_gating_func")
    biased = any(name.endswith(".exp_probs_b.bias") for name in header.file.tensors)
    return biased if function is None else bool(function == 2)


def _deepseek(model_type: str, **more: Any) -> Architecture:
    return Architecture(
        model_type=model_type,
        fields=_DEEPSEEK_EXPERTS | {"kv_lora_rank": "attention.kv_lora_rank"},
        defaults=_DEEPSEEK_DEFAULTS,
        rope=_deepseek_rope,
        names=shared_experts("mlp.shared_experts")
        | _CHOICE_BIAS
        | {
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_kv_b": "self_attn.kv_b_proj",
        },
        joined={
            "self_attn.kv_b_proj.weight": Join(
                ("attn_k_b.weight", "attn_v_b.weight"), keys_and_values
            )
        },
        **more,
    )


_GLM4_MOE = Architecture(
    model_type="glm4_moe",
    fields=_DEEPSEEK_EXPERTS | _HEAD_DIM,
    defaults=_DEEPSEEK_DEFAULTS | {"head_dim": None},
    more=_glm4_moe,
    rope=partial_rope,
    names=shared_experts("mlp.shared_experts")
    | _CHOICE_BIAS
    | {"post_attention_norm": "post_attention_layernorm"},
)

ARCHITECTURES: Mapping[str, tuple[Architecture, ...]] = {
    "qwen2moe": _QWEN[:1],
    "qwen3moe": _QWEN[1:],
    "olmoe": (
        Architecture(
            model_type="olmoe",
            fields=_EXPERTS | {"intermediate_size": "feed_forward_length"},
            defaults={"norm_topk_prob": False},
        ),
    ),
    "llama": (
        Architecture(
            model_type="mixtral",
            fields=_HEAD_DIM
            | {"num_local_experts": "expert_count", "intermediate_size": "feed_forward_length"},
            defaults={"head_dim": None},
            turned=_IN_PAIRS,
        ),
    ),
    "gpt-oss": (
        Architecture(
            model_type="gpt_oss",
            fields=_HEAD_DIM
            | {
                "num_local_experts": "expert_count",
                "intermediate_size": "expert_feed_forward_length",
                "sliding_window": "attention.sliding_window",
            },
            rope=smooth_rope,
            names={
                "post_attention_norm": "post_attention_layernorm",
                "attn_sinks.weight": "self_attn.sinks",
                "ffn_gate_inp": "mlp.router",
            },
        ),
    ),
    "deepseek2": (
        _deepseek("deepseek_v3", more=_latent_attention, when=_is_sigmoid),
        _deepseek("deepseek_v2", more=_deepseek_v2),
    ),
    "glm4moe": (_GLM4_MOE,),
}


def architecture_of(header: Header) -> Architecture | None:
    """The row of a file; None where there is none."""
    rows = ARCHITECTURES.get(header.architecture, ())
    return next((row for row in rows if row.when(header)), None)
