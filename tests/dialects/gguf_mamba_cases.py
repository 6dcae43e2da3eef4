"""GGUF files of models with Mamba: sizes of the originals, keys and changes.

What converters write is spelled out here, from their documentation and code.
"""

from __future__ import annotations

from typing import Any

import torch
from gguf_models import Case, Stored
from gguf_softmax_cases import GRANITE, GRANITE_KEYS, GRANITE_NAMES, granite

GROUPS = 2


def mamba(name: str, tensor: torch.Tensor) -> Stored:
    last = name.split(".mamba.")[-1].split(".mixer.")[-1]
    if last == "A_log":
        tensor = -tensor.exp()[:, None]
    elif last == "D":
        tensor = tensor[:, None]
    elif last == "dt_bias":
        name = name.replace("dt_bias", "dt_proj.bias" if ".mamba." in name else "dt.bias")
    elif last == "conv1d.weight":
        tensor = tensor.squeeze(1)
    elif last == "norm.weight":
        tensor = tensor.view(GROUPS, -1)
    yield name, tensor


def granite_hybrid(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    if ".mamba." in name:
        yield from mamba(name, tensor)
    else:
        yield from granite(config, name, tensor)


def nemotron(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """Layers of the original are those of its backbone, whichever kind they are."""
    if ".mixer." in name:
        name = name.replace("model.layers", "backbone.layers")
        number = int(name.split(".")[2])
        if config.layers_block_type[number] == "linear_attention":
            yield from mamba(name, tensor)
            return
    yield name, tensor


MAMBA_CASES = [
    *(
        Case(
            label=f"granitehybrid {'with' if turns else 'without'} positions",
            architecture="granitehybrid",
            model_type="granitemoehybrid",
            sizes=GRANITE
            | {
                "num_hidden_layers": 3,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "shared_intermediate_size": 32,
                "position_embedding_type": "rope" if turns else "nope",
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_expand": 2,
                "mamba_n_groups": GROUPS,
                "mamba_d_state": 8,
                "mamba_d_conv": 3,
            },
            keys=GRANITE_KEYS
            | {
                "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": 32,
                "Attention.HEAD_COUNT_KV": [0, 2, 0],
                "Rope.SCALING_FINETUNED": turns,
                "SSM.CONV_KERNEL": 3,
                "SSM.STATE_SIZE": 8,
                "SSM.GROUP_COUNT": GROUPS,
                "SSM.INNER_SIZE": 128,
                "SSM.TIME_STEP_RANK": 8,
            },
            change=granite_hybrid,
            named=GRANITE_NAMES
            | {"shared_mlp.gate_proj.weight": "ffn_gate_shexp.weight"}
            | {"shared_mlp.up_proj.weight": "ffn_up_shexp.weight"},
        )
        for turns in (True, False)
    ),
    *(
        Case(
            label=f"nemotron_h_moe {'with' if latent else 'without'} a latent",
            architecture="nemotron_h_moe",
            model_type="nemotron_h",
            sizes={
                "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
                "num_hidden_layers": 4,
                "head_dim": 16,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "moe_intermediate_size": 32,
                "moe_shared_expert_intermediate_size": 64,
                "moe_latent_size": latent,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.5,
                "n_group": 1,
                "topk_group": 1,
                "mamba_num_heads": 8,
                "mamba_head_dim": 16,
                "n_groups": GROUPS,
                "ssm_state_size": 8,
                "conv_kernel": 3,
            },
            keys={
                "LLM.FEED_FORWARD_LENGTH": [0, 32, 0, 32],
                "LLM.EXPERT_COUNT": 4,
                "LLM.EXPERT_SHARED_COUNT": 1,
                "LLM.EXPERT_FEED_FORWARD_LENGTH": 32,
                "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": 64,
                "LLM.EXPERT_WEIGHTS_SCALE": 1.5,
                "LLM.EXPERT_WEIGHTS_NORM": True,
                "LLM.EXPERT_GROUP_COUNT": 1,
                "LLM.MOE_LATENT_SIZE": latent,
                "Attention.HEAD_COUNT_KV": [0, 0, 2, 0],
                "Attention.KEY_LENGTH": 16,
                "Attention.VALUE_LENGTH": 16,
                "SSM.CONV_KERNEL": 3,
                "SSM.STATE_SIZE": 8,
                "SSM.GROUP_COUNT": GROUPS,
                "SSM.INNER_SIZE": 128,
                "SSM.TIME_STEP_RANK": 8,
            },
            change=nemotron,
            named={
                ".experts.up_proj.weight": "ffn_up_exps.weight",
                ".experts.down_proj.weight": "ffn_down_exps.weight",
                "shared_experts.up_proj.weight": "ffn_up_shexp.weight",
                "shared_experts.down_proj.weight": "ffn_down_shexp.weight",
            },
        )
        for latent in (None, 32)
    ),
]
