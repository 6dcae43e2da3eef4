"""GGUF files of DeepSeek and its kin: sizes of the originals, keys and changes.

What converters write is spelled out here, from their documentation and code.
"""

from __future__ import annotations

from typing import Any

import torch
from gguf_models import Case, Stored

ROUTED_SIZES = {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
}
DEEPSEEK_SIZES = ROUTED_SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 4.0,
        "beta_slow": 0.1,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 4096,
    },
}
DEEPSEEK_EXPERTS = {
    "LLM.EXPERT_COUNT": 8,
    "LLM.EXPERT_SHARED_COUNT": 2,
    "LLM.EXPERT_FEED_FORWARD_LENGTH": 32,
    "LLM.LEADING_DENSE_BLOCK_COUNT": 1,
    "LLM.EXPERT_WEIGHTS_SCALE": 1.5,
    "LLM.EXPERT_GROUP_COUNT": 4,
    "LLM.EXPERT_GROUP_USED_COUNT": 2,
}
DEEPSEEK_KEYS = DEEPSEEK_EXPERTS | {
    "Attention.HEAD_COUNT_KV": 1,
    "Attention.Q_LORA_RANK": 64,
    "Attention.KV_LORA_RANK": 32,
    "Attention.KEY_LENGTH": 40,
    "Attention.VALUE_LENGTH": 32,
    "Attention.KEY_LENGTH_MLA": 24,
    "Attention.VALUE_LENGTH_MLA": 32,
    "Rope.DIMENSION_COUNT": 8,
    "Rope.SCALING_TYPE": "yarn",
    "Rope.SCALING_FACTOR": 40.0,
    "Rope.SCALING_ORIG_CTX_LEN": 4096,
    "Rope.SCALING_YARN_BETA_FAST": 4.0,
    "Rope.SCALING_YARN_BETA_SLOW": 0.1,
    "Rope.SCALING_YARN_LOG_MUL": 0.07,
}
SIGMOID = {"LLM.EXPERT_GATING_FUNC": 2, "LLM.EXPERT_WEIGHTS_NORM": True}
SOFTMAX = {"LLM.EXPERT_GATING_FUNC": 1}


def absorbed(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """What makes keys of the latent is turned, so that it can be applied to queries."""
    if not name.endswith("kv_b_proj.weight"):
        yield name, tensor
        return
    heads, sizes = config.num_attention_heads, [config.qk_nope_head_dim, config.v_head_dim]
    k_b, v_b = tensor.unflatten(0, (heads, -1)).split(sizes, dim=1)
    yield name.replace("kv_b_proj", "k_b_proj"), k_b.mT
    yield name.replace("kv_b_proj", "v_b_proj"), v_b


DEEPSEEK = [
    Case(
        architecture="deepseek2",
        model_type="deepseek_v3",
        sizes=DEEPSEEK_SIZES,
        keys=DEEPSEEK_KEYS | SIGMOID,
        change=absorbed,
        plain=("attn_k_b",),
    ),
    Case(
        label="deepseek2 of before absorption",
        architecture="deepseek2",
        model_type="deepseek_v3",
        sizes=DEEPSEEK_SIZES | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        keys=DEEPSEEK_KEYS
        | {
            "LLM.EXPERT_GROUP_COUNT": None,
            "LLM.EXPERT_GROUP_USED_COUNT": None,
            "Attention.HEAD_COUNT_KV": 4,
            "Attention.KEY_LENGTH": 24,
            "Attention.KEY_LENGTH_MLA": None,
            "Attention.VALUE_LENGTH_MLA": None,
        },
    ),
    *(
        Case(
            label=f"deepseek2 of {count} experts whose groups are not told",
            architecture="deepseek2",
            model_type=model_type,
            sizes=DEEPSEEK_SIZES
            | more
            | {"num_hidden_layers": 2, "n_routed_experts": count, "n_group": 8, "topk_group": used},
            keys=DEEPSEEK_KEYS
            | function
            | {
                "LLM.EXPERT_COUNT": count,
                "LLM.EXPERT_GROUP_COUNT": None,
                "LLM.EXPERT_GROUP_USED_COUNT": None,
            },
            change=absorbed,
            plain=("attn_k_b",),
        )
        for count, used, model_type, function, more in (
            (256, 4, "deepseek_v3", SIGMOID, {}),
            (160, 3, "deepseek_v2", SOFTMAX, {"topk_method": "group_limited_greedy"}),
        )
    ),
    Case(
        label="deepseek2 of GLM-4.7-Flash",
        architecture="deepseek2",
        model_type="glm4_moe_lite",
        sizes=DEEPSEEK_SIZES
        | {"norm_topk_prob": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        keys={key: value for key, value in DEEPSEEK_KEYS.items() if "SCALING" not in key}
        | {"LLM.EXPERT_WEIGHTS_NORM": True},
        change=absorbed,
        plain=("attn_k_b",),
    ),
    Case(
        label="deepseek2 with softmax",
        architecture="deepseek2",
        model_type="deepseek_v2",
        sizes=DEEPSEEK_SIZES | {"topk_method": "group_limited_greedy"},
        keys=DEEPSEEK_KEYS | SOFTMAX,
        change=absorbed,
        plain=("attn_k_b",),
    ),
    Case(
        label="deepseek2 lite",
        architecture="deepseek2",
        model_type="deepseek_v2",
        sizes=DEEPSEEK_SIZES
        | {
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": 4096,
            },
        },
        keys=DEEPSEEK_KEYS
        | {
            "Rope.SCALING_YARN_BETA_FAST": None,
            "Rope.SCALING_YARN_BETA_SLOW": None,
            "Rope.SCALING_YARN_LOG_MUL": None,
            "LLM.EXPERT_GROUP_COUNT": None,
            "LLM.EXPERT_GROUP_USED_COUNT": None,
            "Attention.Q_LORA_RANK": None,
        },
        change=absorbed,
        plain=("attn_k_b",),
    ),
]
SIGMOID_CASES = [
    *DEEPSEEK,
    *(
        Case(
            label=f"glm4moe {'with' if norms else 'without'} norms of heads",
            architecture="glm4moe",
            model_type="glm4_moe",
            sizes=ROUTED_SIZES
            | {
                "head_dim": 16,
                "norm_topk_prob": True,
                "attention_bias": True,
                "use_qk_norm": norms,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.25,
                },
            },
            keys=DEEPSEEK_EXPERTS
            | SIGMOID
            | {
                "LLM.BLOCK_COUNT": 4,
                "LLM.NEXTN_PREDICT_LAYERS": 1,
                "Attention.KEY_LENGTH": 16,
                "Attention.VALUE_LENGTH": 16,
                "Rope.DIMENSION_COUNT": 4,
            },
        )
        for norms in (True, False)
    ),
    Case(
        architecture="dots1",
        model_type="dots1",
        sizes=ROUTED_SIZES | {"head_dim": 16, "norm_topk_prob": True, "sliding_window": None},
        keys=DEEPSEEK_EXPERTS | SIGMOID | {"Attention.KEY_LENGTH": 16},
    ),
    Case(
        architecture="minimax-m2",
        model_type="minimax_m2",
        sizes={
            "num_local_experts": 4,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
        },
        keys=SIGMOID
        | {
            "LLM.EXPERT_COUNT": 4,
            "LLM.EXPERT_FEED_FORWARD_LENGTH": 96,
            "Attention.KEY_LENGTH": 32,
            "Attention.VALUE_LENGTH": 32,
            "Rope.DIMENSION_COUNT": 16,
        },
        named={"e_score_correction_bias": "exp_probs_b.bias"},
    ),
    Case(
        architecture="exaone-moe",
        model_type="exaone_moe",
        sizes={
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 8,
            "num_shared_experts": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "n_group": 4,
            "topk_group": 2,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        keys=DEEPSEEK_EXPERTS
        | SIGMOID
        | {
            "Attention.KEY_LENGTH": 16,
            "Attention.SLIDING_WINDOW": 3,
            "Attention.SLIDING_WINDOW_PATTERN": [True, False, True],
            "Rope.SCALING_TYPE": "none",
        },
    ),
    Case(
        architecture="afmoe",
        model_type="afmoe",
        sizes={
            "num_hidden_layers": 5,
            "head_dim": 16,
            "num_experts": 8,
            "num_shared_experts": 2,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "route_scale": 1.5,
            "sliding_window": 3,
            "mup_enabled": True,
        },
        keys=DEEPSEEK_EXPERTS
        | SIGMOID
        | {
            "LLM.EXPERT_GROUP_COUNT": 1,
            "LLM.EXPERT_GROUP_USED_COUNT": 1,
            "Attention.KEY_LENGTH": 16,
            "Attention.SLIDING_WINDOW": 3,
            "Rope.DIMENSION_COUNT": 16,
        },
        named={"expert_bias": "exp_probs_b.bias"},
    ),
]
