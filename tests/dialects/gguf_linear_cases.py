"""GGUF files of models with linear attention: sizes of the originals, keys and changes.

What converters write is spelled out here, from their documentation and code.
"""

from __future__ import annotations

from typing import Any

import torch
from gguf_models import Case, Stored

SIZES = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
    },
}
KEYS = {
    "LLM.EXPERT_COUNT": 4,
    "LLM.EXPERT_FEED_FORWARD_LENGTH": 32,
    "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": 64,
    "LLM.FULL_ATTENTION_INTERVAL": 2,
    "Attention.KEY_LENGTH": 32,
    "Attention.VALUE_LENGTH": 32,
    "Rope.DIMENSION_COUNT": 16,
    "SSM.CONV_KERNEL": 3,
    "SSM.STATE_SIZE": 16,
    "SSM.GROUP_COUNT": 2,
    "SSM.TIME_STEP_RANK": 6,
    "SSM.INNER_SIZE": 192,
}


def qwen3_next(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """Queries, keys, values and gates of each key head, to all queries, all keys and so on."""
    if "in_proj_qkvz" not in name:
        yield from common(name, tensor)
        return
    keys, size = config.linear_num_key_heads, config.linear_key_head_dim
    wide = config.linear_num_value_heads // keys * config.linear_value_head_dim
    parts = tensor.unflatten(0, (keys, -1)).split([size, size, wide, wide], dim=1)
    q, k, v, z = (part.flatten(0, 1) for part in parts)
    yield name.replace("qkvz", "qkv"), torch.cat([q, k, v])
    yield name.replace("qkvz", "z"), z


def qwen35(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """Value heads of each key head, to the first of every key head, the second, and so on."""
    last = name.split(".linear_attn.")[-1].split(".")[0]
    if ".linear_attn." in name and last != "norm":
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        axis = int(last == "out_proj")
        is_behind = last in ("in_proj_qkv", "conv1d")
        before = 2 * keys * config.linear_key_head_dim if is_behind else 0
        first, rest = tensor.split([before, tensor.shape[axis] - before], axis)
        each = rest.unflatten(axis, (keys, values // keys, -1))
        order = [
            each.select(axis, key).select(axis, value)
            for value in range(values // keys)
            for key in range(keys)
        ]
        tensor = torch.cat([first, *order], axis)
    yield from common(name, tensor)


def common(name: str, tensor: torch.Tensor) -> Stored:
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    elif name.endswith("dt_bias"):
        name = name.replace("dt_bias", "dt_proj.bias")
    elif "conv1d" in name:
        tensor = tensor.squeeze(1)
    elif name.endswith("norm.weight") and "linear_attn" not in name:
        tensor = tensor + 1
    yield name, tensor


def lfm2(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    if "conv.conv" in name:
        tensor = tensor.squeeze(1)
    yield f"{name}.bias" if name.endswith("expert_bias") else name, tensor


LINEAR_CASES = [
    *(
        Case(
            label=f"lfm2moe {'with' if biased else 'without'} a bias for the choice",
            architecture="lfm2moe",
            model_type="lfm2_moe",
            sizes={
                "num_hidden_layers": 4,
                "num_experts": 4,
                "moe_intermediate_size": 32,
                "num_dense_layers": 1,
                "conv_L_cache": 3,
                "use_expert_bias": biased,
                "layer_types": ["conv", "full_attention", "conv", "full_attention"],
                "tie_word_embeddings": True,
            },
            keys={
                "LLM.EXPERT_COUNT": 4,
                "LLM.EXPERT_FEED_FORWARD_LENGTH": 32,
                "LLM.EXPERT_GATING_FUNC": 2,
                "LLM.LEADING_DENSE_BLOCK_COUNT": 1,
                "Attention.HEAD_COUNT_KV": [0, 2, 0, 2],
                "ShortConv.L_CACHE": 3,
            },
            change=lfm2,
        )
        for biased in (True, False)
    ),
    Case(
        architecture="qwen3next",
        model_type="qwen3_next",
        sizes=SIZES,
        keys=KEYS,
        change=qwen3_next,
    ),
    Case(
        architecture="qwen35moe",
        model_type="qwen3_5_moe_text",
        sizes=SIZES,
        keys=KEYS,
        change=qwen35,
    ),
]
