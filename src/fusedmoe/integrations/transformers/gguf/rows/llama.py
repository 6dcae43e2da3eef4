"""Llama's kin: heads whose columns turn with their neighbour, frequencies scaled by its rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fusedmoe.checkpoint import CheckpointError
from fusedmoe.integrations.transformers.gguf.architecture import (
    HEAD_DIM,
    Architecture,
    shared_experts,
)
from fusedmoe.integrations.transformers.gguf.header import (
    FREQUENCIES,
    Header,
    attention_bias,
    plain_rope,
)
from fusedmoe.integrations.transformers.gguf.steps import from_pairs

_CONTEXT = 8192  # that Llama 3 and 4 were trained for
LOCAL_EXPERTS = {
    "num_local_experts": "expert_count",
    "intermediate_size": "feed_forward_length",
}
IN_PAIRS = {
    "attn_q": from_pairs("attention.head_count"),
    "attn_k": from_pairs("attention.head_count_kv"),
}


def _scaled_rope(header: Header) -> dict[str, Any]:
    """Columns that turn seldom are slowed down by a factor each, which Llama's rule has made.

    Of the rule, files keep the factors alone: the rest is what Llama 3 and 4 have published.
    """
    found = plain_rope(header)
    if not header.has(FREQUENCIES):
        return found
    factors = header.numbers(FREQUENCIES)
    columns = torch.arange(len(factors), dtype=torch.float64, device=factors.device) / len(factors)
    turns = _CONTEXT / (2 * math.pi * found["rope_theta"] ** columns)
    factor = float(factors.max())
    for low, high in ((1.0, 4.0), (1.0, 1.0)):
        kept = ((turns - low) / max(high - low, 1e-9)).clamp(0, 1)
        if torch.allclose(factors, 1 / ((1 - kept) / factor + kept), rtol=1e-5):
            return found | {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": _CONTEXT,
            }
    raise CheckpointError(f"{header.file.path}: {FREQUENCIES} follows no rule of Llama's")


_MIXTRAL = Architecture(
    model_type="mixtral",
    fields=LOCAL_EXPERTS | HEAD_DIM,
    defaults={"head_dim": None},
    rope=_scaled_rope,
    read_by_rope=(FREQUENCIES,),
    turned=IN_PAIRS,
)


def _llama4(header: Header) -> Mapping[str, Any]:
    """The header says nothing of norms of heads: the model of 128 experts has none."""
    return {
        **attention_bias(header),
        "use_qk_norm": header.number("expert_count") != 128,
        "attention_chunk_size": _CONTEXT,
    }


_LLAMA4 = Architecture(
    model_type="llama4_text",
    fields=HEAD_DIM
    | {
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
        "intermediate_size_mlp": "feed_forward_length",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    },
    more=_llama4,
    rope=_scaled_rope,
    read_by_rope=(FREQUENCIES,),
    names=shared_experts("feed_forward.shared_expert")
    | {f"ffn_{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")}
    | {"ffn_gate_inp": "feed_forward.router"},
)


LLAMA: Mapping[str, tuple[Architecture, ...]] = {
    "llama": (_MIXTRAL,),
    "llama4": (_LLAMA4,),
}
