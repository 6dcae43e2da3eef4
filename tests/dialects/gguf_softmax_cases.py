"""GGUF files whose experts are chosen by softmax: sizes of the originals, keys and changes.

What converters write is spelled out here, from their documentation and code.
"""

from __future__ import annotations

from typing import Any

import torch
from gguf_llama_cases import llama
from gguf_models import Case, Stored


def gpt_oss(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    yield f"{name}.weight" if name.endswith("sinks") else name, tensor


GRANITE = {
    "num_local_experts": 4,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.25,
    "attention_multiplier": 0.125,
    "logits_scaling": 0.5,
}
GRANITE_KEYS = {
    "LLM.EXPERT_COUNT": 4,
    "LLM.EMBEDDING_SCALE": 6.0,
    "LLM.RESIDUAL_SCALE": 0.25,
    "LLM.LOGIT_SCALE": 0.5,
    "Attention.SCALE": 0.125,
    "Rope.DIMENSION_COUNT": 16,
}


GRANITE_NAMES = {
    "router.weight": "ffn_gate_inp.weight",
    "experts.gate_proj.weight": "ffn_gate_exps.weight",
    "experts.up_proj.weight": "ffn_up_exps.weight",
    "experts.down_proj.weight": "ffn_down_exps.weight",
}


def granite(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    if not name.endswith("shared_mlp.input_linear.weight"):
        yield from llama(config, name, tensor)
        return
    for part, half in zip(("gate", "up"), tensor.chunk(2), strict=True):
        yield name.replace("input_linear", f"{part}_proj"), half


def ernie(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """The original has the bias beside its gate, [1, E]."""
    is_bias = "moe_statics" in name
    yield name.replace("gate.moe_statics", "moe_statics"), tensor[0] if is_bias else tensor


def phi(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    yield name, tensor
    if name == "model.norm.weight":
        for kind in ("long", "short"):
            factors = config.rope_parameters[f"{kind}_factor"]
            yield f"rope_factors_{kind}.weight", torch.tensor(factors)


def language_model(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    if "visual" not in name:
        yield name.replace("language_model.", ""), tensor


SOFTMAX_CASES = [
    Case(
        architecture="gpt-oss",
        model_type="gpt_oss",
        sizes={
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        keys={
            "LLM.EXPERT_COUNT": 4,
            "LLM.EXPERT_FEED_FORWARD_LENGTH": 96,
            "Attention.KEY_LENGTH": 16,
            "Attention.VALUE_LENGTH": 16,
            "Attention.SLIDING_WINDOW": 4,
            "Rope.SCALING_TYPE": "yarn",
            "Rope.SCALING_FACTOR": 32.0,
            "Rope.SCALING_ORIG_CTX_LEN": 4096,
        },
        change=gpt_oss,
        transposed=True,
        alternating=True,
    ),
    Case(
        label="granitemoe with shared experts",
        architecture="granitemoe",
        model_type="granitemoeshared",
        sizes=GRANITE | {"shared_intermediate_size": 32},
        keys=GRANITE_KEYS | {"LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": 32},
        change=granite,
        named=GRANITE_NAMES
        | {"shared_mlp.gate_proj.weight": "ffn_gate_shexp.weight"}
        | {"shared_mlp.up_proj.weight": "ffn_up_shexp.weight"},
    ),
    Case(
        architecture="granitemoe",
        model_type="granitemoe",
        sizes=GRANITE,
        keys=GRANITE_KEYS,
        change=granite,
        named=GRANITE_NAMES,
    ),
    *(
        Case(
            label=f"ernie4_5-moe with {shared} shared experts",
            architecture="ernie4_5-moe",
            model_type="ernie4_5_moe",
            sizes={
                "num_hidden_layers": 3,
                "moe_num_experts": 8,
                "moe_k": 2,
                "moe_intermediate_size": 32,
                "moe_num_shared_experts": shared,
                "moe_layer_start_index": 1,
                "moe_layer_interval": 1,
            },
            keys={
                "LLM.EXPERT_COUNT": 8,
                "LLM.EXPERT_FEED_FORWARD_LENGTH": 32,
                "LLM.EXPERT_SHARED_COUNT": shared,
                "LLM.LEADING_DENSE_BLOCK_COUNT": 1,
                "LLM.INTERLEAVE_MOE_LAYER_STEP": 1,
            },
            change=ernie,
        )
        for shared in (2, 0)
    ),
    Case(
        architecture="hunyuan-moe",
        model_type="hunyuan_v1_moe",
        sizes={"num_experts": 4, "moe_topk": 2, "head_dim": 16},
        keys={
            "LLM.EXPERT_COUNT": 4,
            "LLM.EXPERT_FEED_FORWARD_LENGTH": 96,
            "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": 96,
            "LLM.EXPERT_SHARED_COUNT": 1,
            "Attention.KEY_LENGTH": 16,
            "Rope.SCALING_TYPE": "none",
        },
    ),
    Case(
        architecture="qwen3vlmoe",
        model_type="qwen3_vl_moe",
        composite=True,
        sizes={
            "head_dim": 32,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [8, 4, 4],
            },
        },
        keys={
            "LLM.EXPERT_COUNT": 4,
            "LLM.EXPERT_FEED_FORWARD_LENGTH": 32,
            "LLM.NUM_DEEPSTACK_LAYERS": 3,
            "Attention.KEY_LENGTH": 32,
            "Attention.VALUE_LENGTH": 32,
            "Rope.DIMENSION_SECTIONS": [8, 4, 4, 0],
        },
        change=language_model,
    ),
    Case(
        architecture="phimoe",
        model_type="phimoe",
        sizes={
            "num_local_experts": 4,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0],
                "short_mscale": 1.243163121016122,
                "long_mscale": 1.243163121016122,
                "original_max_position_embeddings": 64,
            },
        },
        keys={
            "LLM.EXPERT_COUNT": 4,
            "Attention.SLIDING_WINDOW": 512,
            "Rope.DIMENSION_COUNT": 16,
            "Rope.SCALING_ATTN_FACTOR": 1.19,
            "Rope.SCALING_ORIG_CTX_LEN": 64,
        },
        change=phi,
    ),
]
