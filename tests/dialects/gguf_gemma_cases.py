"""GGUF files of Gemma 4: sizes of the originals, keys and changes.

What converters write is spelled out here, from their documentation and code.
"""

from __future__ import annotations

from typing import Any

import torch
from gguf_models import Case, Stored


def gemma4(config: Any, name: str, tensor: torch.Tensor) -> Stored:
    """Of all layers that see whole sequences, a quarter of a head's columns turn."""
    yield f"{name}.weight" if name.endswith("layer_scalar") else name, tensor
    if name == "model.norm.weight":
        half = 16
        yield "rope_freqs.weight", torch.tensor([1.0] * (half // 4) + [1e30] * (half - half // 4))


GEMMA_CASES = [
    Case(
        label=f"gemma4 {'without' if shared else 'with'} values of its own",
        architecture="gemma4",
        model_type="gemma4_text",
        sizes={
            "num_hidden_layers": 4,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "enable_moe_block": True,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1 if shared else 2,
            "attention_k_eq_v": shared,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 3,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 2e5,
                },
            },
        },
        keys={
            "LLM.EXPERT_COUNT": 4,
            "LLM.EXPERT_FEED_FORWARD_LENGTH": 32,
            "LLM.EMBD_LENGTH_PER_LAYER_INP": 0,
            "LLM.FINAL_LOGIT_SOFTCAPPING": 3.0,
            "Attention.HEAD_COUNT_KV": [2, 1, 2, 1] if shared else 2,
            "Attention.KEY_LENGTH": 32,
            "Attention.VALUE_LENGTH": 32,
            "Attention.KEY_LENGTH_SWA": 16,
            "Attention.VALUE_LENGTH_SWA": 16,
            "Attention.SHARED_KV_LAYERS": 0,
            "Attention.SLIDING_WINDOW": 3,
            "Attention.SLIDING_WINDOW_PATTERN": [True, False, True, False],
            "Rope.FREQ_BASE": 2e5,
            "Rope.FREQ_BASE_SWA": 5000.0,
            "Rope.DIMENSION_COUNT": 32,
            "Rope.DIMENSION_COUNT_SWA": 16,
        },
        change=gemma4,
        fused=True,
        named={
            "router.scale": "ffn_gate_inp.scale",
            "router.per_expert_scale": "ffn_down_exps.scale",
        },
    )
    for shared in (True, False)
]
