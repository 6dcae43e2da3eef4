"""Architectures most of whose layers are of Mamba's second kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedmoe.integrations.transformers.gguf.architecture import HEAD_DIM, Architecture
from fusedmoe.integrations.transformers.gguf.header import Header
from fusedmoe.integrations.transformers.gguf.rows.llama import IN_PAIRS
from fusedmoe.integrations.transformers.gguf.rows.softmax import (
    GRANITE_FIELDS,
    GRANITE_JOINED,
    GRANITE_NAMES,
)
from fusedmoe.integrations.transformers.gguf.steps import (
    flat,
    log_of_decay,
    one_after_the_other,
    with_channel,
)

_TURNED = {
    "ssm_a": one_after_the_other(flat, log_of_decay),
    "ssm_d": flat,
    "ssm_norm": flat,
    "ssm_conv1d.weight": with_channel,
}


def _mamba(module: str) -> dict[str, str]:
    """Names of its tensors, where a layer has them as ``module``."""
    same = {"ssm_conv1d": "conv1d", "ssm_in": "in_proj", "ssm_norm": "norm", "ssm_out": "out_proj"}
    exact = {"ssm_a": "A_log", "ssm_d": "D", "ssm_dt.bias": "dt_bias"}
    return {name: f"{module}.{below}" for name, below in (same | exact).items()}


def _granite(header: Header) -> Mapping[str, Any]:
    """Layers without keys are Mamba's; positions are turned unless the header says no."""
    heads, inner = header.of_layers("attention.head_count_kv"), header.number("ssm.inner_size")
    turns = header.get("rope.scaling.finetuned") is not False
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "linear_attention" for count in heads],
        "mamba_d_head": inner // header.number("ssm.time_step_rank"),
        "mamba_expand": inner // header.number("embedding_length"),
        "position_embedding_type": "rope" if turns else None,
        "mamba_conv_bias": any(name.endswith(".ssm_conv1d.bias") for name in header.file.tensors),
    }


_GRANITE = Architecture(
    model_type="granitemoehybrid",
    fields=GRANITE_FIELDS
    | {
        "num_key_value_heads": None,
        "shared_intermediate_size": "expert_shared_feed_forward_length",
        "mamba_n_heads": "ssm.time_step_rank",
        "mamba_n_groups": "ssm.group_count",
        "mamba_d_state": "ssm.state_size",
        "mamba_d_conv": "ssm.conv_kernel",
    },
    more=_granite,
    names=GRANITE_NAMES | _mamba("mamba"),
    turned=_TURNED | IN_PAIRS,
    joined=GRANITE_JOINED,
)


def _nemotron(header: Header) -> Mapping[str, Any]:
    """A layer is attention, experts, or Mamba, and its tensors tell which."""

    def kind(number: int) -> str:
        if header.has(f"blk.{number}.attn_q.weight"):
            return "full_attention"
        has_experts = header.has(f"blk.{number}.ffn_up_exps.weight")
        return "moe" if has_experts else "linear_attention"

    return {
        "num_key_value_heads": header.count("attention.head_count_kv"),
        "layers_block_type": [kind(number) for number in range(header.num_layers)],
        "mamba_head_dim": header.number("ssm.inner_size") // header.number("ssm.time_step_rank"),
    }


_NEMOTRON = Architecture(
    model_type="nemotron_h",
    fields=HEAD_DIM
    | {
        "rms_norm_eps": None,
        "num_key_value_heads": None,
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "mamba_num_heads": "ssm.time_step_rank",
        "n_groups": "ssm.group_count",
        "ssm_state_size": "ssm.state_size",
        "conv_kernel": "ssm.conv_kernel",
        "n_routed_experts": "expert_count",
        "n_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "moe_latent_size": "moe_latent_size",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": "expert_weights_norm",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
    },
    defaults={"moe_latent_size": None, "n_group": 1, "topk_group": 1},
    more=_nemotron,
    rope=None,
    activation="relu2_no_mul",
    whole={"token_embd": "model.embeddings", "output_norm": "model.norm_f"},
    names={
        "attn_norm": "norm",
        **{f"attn_{name}": f"mixer.{name}_proj" for name in ("q", "k", "v")},
        "attn_output": "mixer.o_proj",
        "ffn_gate_inp": "mixer.gate",
        "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
        "ffn_up_shexp": "mixer.shared_experts.up_proj",
        "ffn_down_shexp": "mixer.shared_experts.down_proj",
        "ffn_latent_down": "mixer.fc1_latent_proj",
        "ffn_latent_up": "mixer.fc2_latent_proj",
        **_mamba("mixer"),
    },
    turned=_TURNED,
)

MAMBA: Mapping[str, tuple[Architecture, ...]] = {
    "granitehybrid": (_GRANITE,),
    "nemotron_h_moe": (_NEMOTRON,),
}
