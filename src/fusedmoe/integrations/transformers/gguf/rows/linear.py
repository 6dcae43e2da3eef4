"""Architectures most of whose layers have linear attention, or convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedmoe.integrations.transformers.gguf.architecture import (
    HEAD_DIM,
    MOE_SIZES,
    Architecture,
    shared_experts,
)
from fusedmoe.integrations.transformers.gguf.header import Header, partial_rope
from fusedmoe.integrations.transformers.gguf.steps import (
    Join,
    as_row,
    by_key_head,
    less_one,
    log_of_decay,
    of_each_key_head,
    one_after_the_other,
    with_channel,
)

_FIELDS = HEAD_DIM | {
    "num_experts": "expert_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
_NAMES = shared_experts("mlp.shared_expert") | {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "post_attention_norm": "post_attention_layernorm",
    "ssm_a": "linear_attn.A_log",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_NORMS = ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "output_norm")
_TURNED = dict.fromkeys(_NORMS, less_one) | {"ffn_gate_inp_shexp": as_row}


def _linear_layers(header: Header) -> Mapping[str, Any]:
    """Every so many layers one has full attention."""
    interval = header.number("full_attention_interval", 4)
    values, width = header.number("ssm.time_step_rank"), header.number("ssm.inner_size")
    kinds = ("full_attention", "linear_attention")
    return {
        "linear_value_head_dim": width // values,
        "layer_types": [kinds[bool((n + 1) % interval)] for n in range(header.num_layers)],
    }


_QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    fields=_FIELDS | {"intermediate_size": "feed_forward_length"},
    defaults={"norm_topk_prob": True},
    more=_linear_layers,
    rope=partial_rope,
    names=_NAMES | {"ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"},
    turned=_TURNED | {"ssm_a": log_of_decay, "ssm_conv1d": with_channel},
    joined={
        "linear_attn.in_proj_qkvz.weight": Join(
            ("attn_qkv.weight", "attn_gate.weight"), of_each_key_head
        )
    },
)
_QWEN35 = Architecture(
    model_type="qwen3_5_moe_text",
    fields=_FIELDS,
    more=_linear_layers,
    rope=partial_rope,
    names=_NAMES
    | {
        "attn_qkv": "linear_attn.in_proj_qkv",
        "attn_gate": "linear_attn.in_proj_z",
        "ssm_alpha": "linear_attn.in_proj_a",
        "ssm_beta": "linear_attn.in_proj_b",
    },
    turned=_TURNED
    | {
        "attn_qkv": by_key_head(behind_keys=True),
        "attn_gate": by_key_head(),
        "ssm_alpha": by_key_head(),
        "ssm_beta": by_key_head(),
        "ssm_dt": by_key_head(),
        "ssm_a": one_after_the_other(by_key_head(), log_of_decay),
        "ssm_conv1d": one_after_the_other(by_key_head(behind_keys=True), with_channel),
        "ssm_out": by_key_head(1),
    },
)


def _convolutions(header: Header) -> Mapping[str, Any]:
    """Layers without keys convolve."""
    heads = header.of_layers("attention.head_count_kv")
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "use_expert_bias": header.has(f"blk.{header.num_layers - 1}.exp_probs_b.bias"),
    }


_LFM2 = Architecture(
    model_type="lfm2_moe",
    fields=MOE_SIZES
    | {
        "num_experts": "expert_count",
        "num_dense_layers": "leading_dense_block_count",
        "conv_L_cache": "shortconv.l_cache",
        "norm_eps": "attention.layer_norm_rms_epsilon",
        "rms_norm_eps": None,
        "num_key_value_heads": None,
    },
    defaults={"norm_topk_prob": True},
    more=_convolutions,
    whole={"token_embd_norm": "model.embedding_norm"},
    names={
        "attn_norm": "operator_norm",
        "ffn_norm": "ffn_norm",
        "attn_output": "self_attn.out_proj",
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
        "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
        "ffn_gate_inp": "feed_forward.gate",
        "exp_probs_b.bias": "feed_forward.expert_bias",
        "ffn_gate": "feed_forward.w1",
        "ffn_up": "feed_forward.w3",
        "ffn_down": "feed_forward.w2",
    },
    turned={"shortconv.conv": with_channel},
)

LINEAR: Mapping[str, tuple[Architecture, ...]] = {
    "qwen3next": (_QWEN3_NEXT,),
    "qwen35moe": (_QWEN35,),
    "lfm2moe": (_LFM2,),
}
