"""Architectures whose experts are chosen by softmax, or by the best logits."""

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
    smooth_rope,
)
from fusedmoe.integrations.transformers.gguf.rows.llama import IN_PAIRS, LOCAL_EXPERTS
from fusedmoe.integrations.transformers.gguf.steps import Join, as_row, stacked

_EXPERTS = {"num_experts": "expert_count"}
_QWEN2 = Architecture(
    model_type="qwen2_moe",
    fields=_EXPERTS
    | MOE_SIZES
    | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
    defaults={"norm_topk_prob": False},
    names=shared_experts("mlp.shared_expert") | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
    turned={"ffn_gate_inp_shexp": as_row},
)
_QWEN3 = Architecture(
    model_type="qwen3_moe",
    fields=_EXPERTS | MOE_SIZES | HEAD_DIM,
    defaults={"norm_topk_prob": True, "head_dim": None},
)
_OLMOE = Architecture(
    model_type="olmoe",
    fields=_EXPERTS | {"intermediate_size": "feed_forward_length"},
    defaults={"norm_topk_prob": False},
)
_GPT_OSS = Architecture(
    model_type="gpt_oss",
    fields=HEAD_DIM
    | {
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
        "sliding_window": "attention.sliding_window",
    },
    rope=smooth_rope,
    activation="swigluoai",
    names={
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks.weight": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
)


def _is_shared(header: Header) -> bool:
    return header.has("blk.0.ffn_gate_shexp.weight")


def _turned(header: Header) -> Mapping[str, Any]:
    """Granite 4 without Mamba has this architecture, too, and may know no positions."""
    if header.get("rope.scaling.finetuned") is False:
        raise header.wrong("rope.scaling.finetuned")
    return attention_bias(header)


GRANITE_FIELDS = LOCAL_EXPERTS | {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
GRANITE_NAMES = {
    "ffn_gate_inp": "block_sparse_moe.router",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
GRANITE_JOINED = {
    "shared_mlp.input_linear.weight": Join(
        ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), stacked
    )
}
_GRANITE = (
    Architecture(
        model_type="granitemoeshared",
        fields=GRANITE_FIELDS | {"shared_intermediate_size": "expert_shared_feed_forward_length"},
        more=_turned,
        names=GRANITE_NAMES,
        turned=IN_PAIRS,
        joined=GRANITE_JOINED,
        when=_is_shared,
    ),
    Architecture(
        model_type="granitemoe",
        fields=GRANITE_FIELDS,
        more=_turned,
        names=GRANITE_NAMES,
        turned=IN_PAIRS,
    ),
)
_ERNIE = Architecture(
    model_type="ernie4_5_moe",
    fields=MOE_SIZES
    | {
        "moe_num_experts": "expert_count",
        "moe_num_shared_experts": "expert_shared_count",
        "moe_layer_interval": "interleave_moe_layer_step",
        "moe_layer_start_index": "leading_dense_block_count",
    },
    defaults={"moe_num_shared_experts": 0},
    names=shared_experts("mlp.shared_experts")
    | {"exp_probs_b.bias": "mlp.gate.moe_statics.e_score_correction_bias"},
    turned={"exp_probs_b": as_row},
)


def _hunyuan(header: Header) -> Mapping[str, Any]:
    return {**attention_bias(header), "head_dim": header.head_dim}


_HUNYUAN = Architecture(
    model_type="hunyuan_v1_moe",
    fields=_EXPERTS | {"intermediate_size": "expert_feed_forward_length"},
    more=_hunyuan,
    names=shared_experts("mlp.shared_mlp")
    | {
        "attn_q_norm": "self_attn.query_layernorm",
        "attn_k_norm": "self_attn.key_layernorm",
        "ffn_gate_inp": "mlp.gate.wg",
    },
)


_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_PHI_SCALE = 1.243163121016122  # of sines and cosines; files do not have what Phi-3.5-MoE published


def _phi(header: Header) -> Mapping[str, Any]:
    return {**attention_bias(header), "lm_head_bias": header.has("output.bias")}


def _long_rope(header: Header) -> dict[str, Any]:
    """Factors of columns, in short contexts and in long ones."""
    base = {"rope_theta": float(header.number("rope.freq_base", 10000.0))}
    if not (header.has(_LONG) or header.has(_SHORT)):
        return base | {"rope_type": "default"}
    context = int(header.number("rope.scaling.original_context_length"))
    return base | {
        "rope_type": "longrope",
        "long_factor": header.numbers(_LONG).tolist(),
        "short_factor": header.numbers(_SHORT).tolist(),
        "long_mscale": _PHI_SCALE,
        "short_mscale": _PHI_SCALE,
        "original_max_position_embeddings": context,
    }


_PHI = Architecture(
    model_type="phimoe",
    fields=LOCAL_EXPERTS,
    more=_phi,
    rope=_long_rope,
    read_by_rope=(_LONG, _SHORT),
    names={"ffn_gate_inp": "mlp.router"},
)

SOFTMAX: Mapping[str, tuple[Architecture, ...]] = {
    "qwen2moe": (_QWEN2,),
    "qwen3moe": (_QWEN3,),
    "qwen3vlmoe": (_QWEN3,),
    "olmoe": (_OLMOE,),
    "gpt-oss": (_GPT_OSS,),
    "granitemoe": _GRANITE,
    "ernie4_5-moe": (_ERNIE,),
    "hunyuan-moe": (_HUNYUAN,),
    "phimoe": (_PHI,),
}
