"""What an architecture of GGUF files is, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedmoe.integrations.transformers.gguf.header import Header, plain_rope
from fusedmoe.integrations.transformers.gguf.steps import Join, Turn

# Field of a Transformers configuration: key of the header.
FIELDS = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts_per_tok": "expert_used_count",
}
MOE_SIZES = {
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
}
HEAD_DIM = {"head_dim": "attention.key_length"}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def shared_experts(module: str) -> dict[str, str]:
    """Their names, where a layer has them as ``module``."""
    return {f"ffn_{part}_shexp": f"{module}.{part}_proj" for part in ("gate", "up", "down")}


def anything(header: Header) -> bool:
    return True


def nothing(header: Header) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """``fields`` and ``names`` stand beside, or instead of, those of all.

    ``fields`` are looked up in the header (None: not at all), then in ``defaults`` (None leaves a
    field to Transformers), ``more`` finds those that are no single key, and may be None. ``names``
    are of tensors in a layer, with or without their suffix (``.weight``), ``whole`` of others;
    ``turned`` has both, what ``joined`` makes has its full name. ``read_by_rope`` are tensors
    that are numbers of the configuration. ``when`` tells the rows of one architecture apart.
    """

    model_type: str
    fields: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[Header], Mapping[str, Any]] = nothing
    rope: Callable[[Header], dict[str, Any]] | None = plain_rope
    read_by_rope: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    turned: Mapping[str, Turn] = field(default_factory=dict)
    joined: Mapping[str, Join] = field(default_factory=dict)
    activation: str = "silu"
    when: Callable[[Header], bool] = anything

    def config(self, header: Header) -> dict[str, Any]:
        """Fields of the configuration, but for those that tensors alone tell."""
        values: dict[str, Any] = {"num_hidden_layers": header.num_layers}
        for name, key in {**FIELDS, **self.fields}.items():
            if key is None:
                continue
            value = header.value(key)
            if value is None and name not in self.defaults:
                raise header.wrong(key)
            values[name] = self.defaults[name] if value is None else value
        values = {**self.defaults, **values}
        found = {name: value for name, value in values.items() if value is not None}
        turned = {} if self.rope is None else {"rope_parameters": self.rope(header)}
        return {**found, **self.more(header), **turned}

    def turn_of(self, tensor: str) -> Turn | None:
        """What is done to a tensor."""
        return self.turned.get(tensor) or self.turned.get(tensor.rpartition(".")[0])

    def name_of(self, tensor: str) -> str | None:
        """What Transformers calls a tensor of a layer, below that; None where it has none."""
        names = {**LAYER, **self.names}
        if tensor in names:
            return names[tensor]
        base, _, suffix = tensor.rpartition(".")
        return f"{names[base]}.{suffix}" if base in names else None

    def name_of_whole(self, tensor: str) -> str | None:
        """As ``name_of``, of a tensor outside of layers."""
        base, _, suffix = tensor.rpartition(".")
        names = {**WHOLE, **self.whole}
        return f"{names[base]}.{suffix}" if base in names else None
