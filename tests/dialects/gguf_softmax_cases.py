"""GGUF files whose experts are chosen by softmax: sizes of the originals, keys and changes.

What converters write is spelled out here, from their documentation and code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf_models import Case, Stored, pairs


def llama(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """Heads of the original turn half with half, those of the file neighbour with neighbour."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    yield name, tensor if count is None else pairs(tensor, count)


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


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
DEFAULT = {"rope_type": "default"}


def llama4(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """Frequencies of the first columns stay; the others turn once in more than 8192 tokens."""
    yield name, tensor
    if name == "model.norm.weight" and config.rope_parameters["rope_type"] == "llama3":
        turns = [2 * math.pi * 5e5 ** (2 * column / 16) for column in range(8)]
        factors = [16.0 if length > 8192 else 1.0 for length in turns]
        yield "rope_freqs.weight", torch.tensor(factors)


def llama3(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """Columns that turn less than 4 times in 8192 tokens are slowed down, by 32 below once."""
    yield from llama(config, name, tensor)
    if name == "model.norm.weight":
        factors = []
        for column in range(8):
            turns = 8192 / (2 * math.pi * 5e5 ** (2 * column / 16))
            smooth = (turns - 1) / 3
            middle = 1 / ((1 - smooth) / 32 + smooth)
            factors.append(1.0 if turns > 4 else 32.0 if turns < 1 else middle)
        yield "rope_freqs.weight", torch.tensor(factors)


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
        architecture="llama",
        model_type="mixtral",
        sizes={
            "num_local_experts": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        keys={"LLM.EXPERT_COUNT": 4, "LLM.VOCAB_SIZE": 96, "Rope.DIMENSION_COUNT": 16},
        change=llama,
    ),
    Case(
        label="llama with scaled frequencies",
        architecture="llama",
        model_type="mixtral",
        sizes={
            "num_local_experts": 4,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        keys={"LLM.EXPERT_COUNT": 4, "Rope.DIMENSION_COUNT": 16},
        change=llama3,
    ),
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
    *(
        Case(
            label=f"llama4 {'with' if scaled else 'without'} scaled frequencies",
            architecture="llama4",
            model_type="llama4_text",
            sizes={
                "num_hidden_layers": 4,
                "head_dim": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "intermediate_size": 96,
                "intermediate_size_mlp": 128,
                "interleave_moe_layer_step": 2,
                "rope_parameters": {"rope_theta": 5e5} | (LLAMA3 if scaled else DEFAULT),
            },
            keys={
                "LLM.EXPERT_COUNT": 4,
                "LLM.EXPERT_USED_COUNT": 1,
                "LLM.EXPERT_FEED_FORWARD_LENGTH": 96,
                "LLM.FEED_FORWARD_LENGTH": 128,
                "LLM.INTERLEAVE_MOE_LAYER_STEP": 2,
                "Attention.KEY_LENGTH": 16,
                "Attention.VALUE_LENGTH": 16,
                "Rope.DIMENSION_COUNT": 16,
            },
            change=llama4,
            transposed=True,
        )
        for scaled in (True, False)
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
