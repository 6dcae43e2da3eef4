"""Gemma 4: two kinds of layers, with heads of their own, and experts beside a dense block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedmoe.integrations.transformers.gguf.architecture import MOE_SIZES, Architecture
from fusedmoe.integrations.transformers.gguf.header import FREQUENCIES, Header, sliding_layers


def _two_kinds(header: Header) -> Mapping[str, Any]:
    kinds = sliding_layers(header)
    heads = dict(zip(kinds, header.of_layers("attention.head_count_kv"), strict=True))
    whole = kinds.index("full_attention") if "full_attention" in kinds else 0
    return {
        "layer_types": kinds,
        "num_key_value_heads": heads.get("sliding_attention", heads[kinds[whole]]),
        "num_global_key_value_heads": heads[kinds[whole]],
        "global_head_dim": header.number("attention.key_length"),
        "attention_k_eq_v": not header.has(f"blk.{whole}.attn_v.weight"),
        "enable_moe_block": True,
    }


def _two_ropes(header: Header) -> dict[str, Any]:
    """Where whole sequences are seen, columns that do not turn have a frequency of almost 0."""
    part = 1.0
    if header.has(FREQUENCIES):
        part = float((header.numbers(FREQUENCIES) == 1).double().mean())
    return {
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": float(header.number("rope.freq_base_swa", 10000.0)),
        },
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": float(header.number("rope.freq_base")),
            "partial_rotary_factor": part,
        },
    }


_GEMMA4 = Architecture(
    model_type="gemma4_text",
    fields=MOE_SIZES
    | {
        "num_key_value_heads": None,
        "num_experts_per_tok": None,
        "num_experts": "expert_count",
        "top_k_experts": "expert_used_count",
        "head_dim": "attention.key_length_swa",
        "sliding_window": "attention.sliding_window",
        "num_kv_shared_layers": "attention.shared_kv_layers",
        "hidden_size_per_layer_input": "embedding_length_per_layer_input",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    defaults={
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": None,
    },
    more=_two_kinds,
    rope=_two_ropes,
    read_by_rope=(FREQUENCIES,),
    activation="gelu_tanh",
    names={
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "layer_output_scale.weight": "layer_scalar",
        "ffn_gate_inp.weight": "router.proj.weight",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_down_exps.scale": "router.per_expert_scale",
    },
)

GEMMA: Mapping[str, tuple[Architecture, ...]] = {"gemma4": (_GEMMA4,)}
