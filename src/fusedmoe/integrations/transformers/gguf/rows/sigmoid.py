"""DeepSeek's architectures and those that choose experts by sigmoid, with a bias, as its third."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedmoe.integrations.transformers.gguf.architecture import (
    HEAD_DIM,
    MOE_SIZES,
    Architecture,
    shared_experts,
)
from fusedmoe.integrations.transformers.gguf.header import (
    Header,
    attention_bias,
    partial_rope,
    plain_rope,
    sliding_layers,
)
from fusedmoe.integrations.transformers.gguf.steps import Join, keys_and_values

_EXPERTS = MOE_SIZES | {
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
_DEFAULTS = {
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "n_group": 1,
    "topk_group": 1,
}
_NAMES = shared_experts("mlp.shared_experts") | {
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias"
}


def _is_sigmoid(header: Header) -> bool:
    """Where the header does not say it, a bias for the choice does."""
    function = header.get("expert_gating_func")
    biased = any(name.endswith(".exp_probs_b.bias") for name in header.file.tensors)
    return biased if function is None else bool(function == 2)


# (groups, groups used) that DeepSeek-V3 and V2 have published: older files leave them out.
_PUBLISHED_GROUPS = {256: (8, 4), 160: (8, 3)}


def _groups(header: Header) -> dict[str, int]:
    """Into how many experts fall, by their number where the header does not say it."""
    published = _PUBLISHED_GROUPS.get(header.count("expert_count"), (1, 1))
    keys = {"n_group": "expert_group_count", "topk_group": "expert_group_used_count"}
    return {
        name: int(header.number(key, default))
        for (name, key), default in zip(keys.items(), published, strict=True)
    }


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
        **_groups(header),
        "num_key_value_heads": header.number("attention.head_count"),
        "q_lora_rank": header.value("attention.q_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key_length - turned,
        "v_head_dim": value_length,
    }


def _deepseek_v2(header: Header) -> Mapping[str, Any]:
    if header.value("expert_weights_norm"):
        raise header.wrong("expert_weights_norm")
    sizes = _latent_attention(header)
    method = "greedy" if sizes["n_group"] == 1 else "group_limited_greedy"
    return {**sizes, "topk_method": method}


def _deepseek_rope(header: Header) -> dict[str, Any]:
    """YaRN that leaves cosines as they are, and scales scores instead."""
    found = plain_rope(header)
    if found["rope_type"] != "yarn":
        return found
    scale = 10 * header.number("rope.scaling.yarn_log_multiplier", 0.0)
    return found | {"attention_factor": 1.0, "mscale": scale, "mscale_all_dim": scale}


def _deepseek(model_type: str, **more: Any) -> Architecture:
    return Architecture(
        model_type=model_type,
        fields=_EXPERTS | {"kv_lora_rank": "attention.kv_lora_rank"},
        defaults=_DEFAULTS,
        rope=_deepseek_rope,
        names=_NAMES
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


def _glm4_moe(header: Header) -> Mapping[str, Any]:
    return {**attention_bias(header), "use_qk_norm": header.has("blk.0.attn_q_norm.weight")}


_GLM4_MOE = Architecture(
    model_type="glm4_moe",
    fields=_EXPERTS | HEAD_DIM,
    defaults=_DEFAULTS | {"head_dim": None},
    more=_glm4_moe,
    rope=partial_rope,
    names=_NAMES | {"post_attention_norm": "post_attention_layernorm"},
)


def _dots1(header: Header) -> Mapping[str, Any]:
    return {**attention_bias(header), "sliding_window": None}


_DOTS1 = Architecture(
    model_type="dots1",
    fields=_EXPERTS | HEAD_DIM,
    defaults=_DEFAULTS | {"head_dim": None},
    more=_dots1,
    names=_NAMES,
)
_MINIMAX_M2 = Architecture(
    model_type="minimax_m2",
    fields=HEAD_DIM
    | {
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
    },
    rope=partial_rope,
    names={"exp_probs_b.bias": "mlp.e_score_correction_bias"},
)


def _exaone(header: Header) -> Mapping[str, Any]:
    return {"layer_types": sliding_layers(header)}


_EXAONE = Architecture(
    model_type="exaone_moe",
    fields={name: key for name, key in _EXPERTS.items() if not name.startswith("n_")}
    | HEAD_DIM
    | {
        "num_experts": "expert_count",
        "num_shared_experts": "expert_shared_count",
        "n_group": "expert_group_count",
        "sliding_window": "attention.sliding_window",
    },
    defaults=_DEFAULTS | {"head_dim": None},
    more=_exaone,
    names=_NAMES,
)


def _afmoe(header: Header) -> Mapping[str, Any]:
    """Every fourth layer sees whole sequences; embeddings grow with the hidden size."""
    return {"head_dim": header.head_dim, "global_attn_every_n_layers": 4, "mup_enabled": True}


_AFMOE = Architecture(
    model_type="afmoe",
    fields=MOE_SIZES
    | {
        "num_experts": "expert_count",
        "num_shared_experts": "expert_shared_count",
        "num_dense_layers": "leading_dense_block_count",
        "route_scale": "expert_weights_scale",
        "sliding_window": "attention.sliding_window",
    },
    defaults={"route_scale": 1.0},
    more=_afmoe,
    names=shared_experts("mlp.shared_experts")
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_mlp_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
        "attn_gate": "self_attn.gate_proj",
        "ffn_gate_inp": "mlp.router.gate",
        "exp_probs_b.bias": "mlp.expert_bias",
    },
)

SIGMOID: Mapping[str, tuple[Architecture, ...]] = {
    "deepseek2": (
        _deepseek("deepseek_v3", more=_latent_attention, when=_is_sigmoid),
        _deepseek("deepseek_v2", more=_deepseek_v2),
    ),
    "glm4moe": (_GLM4_MOE,),
    "dots1": (_DOTS1,),
    "minimax-m2": (_MINIMAX_M2,),
    "exaone-moe": (_EXAONE,),
    "afmoe": (_AFMOE,),
}
