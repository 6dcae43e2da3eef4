"""The architectures whose GGUF files load as whole models: one row each."""

from __future__ import annotations

from collections.abc import Mapping

from fusedmoe.integrations.transformers.gguf.architecture import Architecture, shared_experts
from fusedmoe.integrations.transformers.gguf.header import Header, smooth_rope
from fusedmoe.integrations.transformers.gguf.steps import as_row, from_pairs

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
}


def architecture_of(header: Header) -> Architecture | None:
    """The row of a file; None where there is none."""
    rows = ARCHITECTURES.get(header.architecture, ())
    return next((row for row in rows if row.when(header)), None)
