"""GGUF files of Llama's kin: sizes of the originals, keys and changes.

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


LLAMA_CASES = [
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
]
