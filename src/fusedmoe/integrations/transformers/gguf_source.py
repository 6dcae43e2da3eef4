"""A GGUF file as the source of a Transformers model: its header's keys, its tensors' names.

One row per architecture whose tensors llama.cpp stores without reordering their rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusedmoe.checkpoint import CONFIG_NAME, CheckpointError
from fusedmoe.integrations.transformers.sources import LazyMatrix
from fusedmoe.quantization.dialects import LayerSchemes, Matrix
from fusedmoe.quantization.dialects.gguf import GgufQuantization
from fusedmoe.weights.checkpoint_experts import ExpertLayer, ExpertTensor
from fusedmoe.weights.families import Part
from fusedmoe.weights.gguf_file import ArrayOf
from fusedmoe.weights.gguf_parts import GgufParts, paths_of

# Field of a Transformers configuration: key of the header, below the architecture's name.
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
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
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS: dict[str, Part] = {
    "ffn_gate_exps": "gate",
    "ffn_up_exps": "up",
    "ffn_down_exps": "down",
    "ffn_gate_up_exps": "gate_up",
}
_IN_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """``fixed`` fields are not in the header: converters leave them to the reader."""

    model_type: str
    sizes: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2moe": Architecture(
        "qwen2_moe",
        {
            "intermediate_size": "feed_forward_length",
            "moe_intermediate_size": "expert_feed_forward_length",
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        },
        {"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {
            "intermediate_size": "feed_forward_length",
            "moe_intermediate_size": "expert_feed_forward_length",
            "head_dim": "attention.key_length",
        },
        {"norm_topk_prob": True},
    ),
    "olmoe": Architecture(
        "olmoe", {"intermediate_size": "feed_forward_length"}, {"norm_topk_prob": False}
    ),
}


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or that is all a folder has of a model; else None.

    Of a model in several parts, the first.
    """
    if path.suffix.lower() == ".gguf":
        return path
    inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not inside or (path / CONFIG_NAME).is_file():
        return None
    return inside[0] if inside == paths_of(inside[0]) else None


class GgufSource:
    """A checked GGUF file, or all parts of one.

    Raises CheckpointError where it is no model that we know; ``any_architecture``: only where it
    has no experts. ``problem`` then says what keeps it from being loaded as a model.
    """

    def __init__(self, path: Path, *, any_architecture: bool = False) -> None:
        self.file = GgufParts(path)
        name = self.file.metadata.get("general.architecture")
        self.name = str(name)
        self.problem: str | None = None
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            self.problem = f"{path}: the architecture is {name!r}; known: {known}"
            if not any_architecture:
                raise CheckpointError(self.problem)
        self.layers = self._expert_layers()
        types = {
            tensor.name.rpartition(".")[0]: tensor.type.name
            for tensor in self.file.tensors.values()
            if tensor.name.endswith(".weight")
        }
        self.quantization = GgufQuantization(types=types)

    @property
    def where(self) -> Path:
        return self.file.path

    def _expert_layers(self) -> dict[tuple[str, int], ExpertLayer]:
        layers: dict[tuple[str, int], ExpertLayer] = {}
        for name in self.file.tensors:
            match = _IN_BLOCK.fullmatch(name)
            if match is None or match[2] not in _EXPERTS:
                continue
            number = int(match[1])
            layer = layers.setdefault(("model.", number), ExpertLayer("model.", number))
            layer.tensors.append(ExpertTensor(name, _EXPERTS[match[2]], None, match[3]))
        if not layers:
            raise CheckpointError(f"{self.where}: no tensor has the name of experts")
        return dict(sorted(layers.items()))

    def schemes(self, layer: ExpertLayer) -> LayerSchemes | None:
        return layer.schemes(self.quantization, self.where)

    def sizes(self) -> dict[str, int]:
        """Of a layer's experts, and how many a token has. CheckpointError where one is unknown."""
        down = next(t for t in next(iter(self.layers.values())).tensors if t.part == "down")
        shape = self.shape(down.name)
        top_k = self.file.metadata.get(f"{self.name}.expert_used_count")
        if len(shape) != 3 or not isinstance(top_k, int):
            raise CheckpointError(
                f"{self.where}: {down.name} is {shape}, {self.name}.expert_used_count {top_k!r}"
            )
        names = ("num_experts", "hidden_size", "intermediate_size")
        return dict(zip(names, shape, strict=True)) | {"top_k": top_k}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[name].shape

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        tensor = self.file.read(name)  # of a mapped file: what is not looked at is not read
        return tensor if rows is None else tensor[rows.start : rows.stop]

    def config(self) -> Any:
        from transformers import CONFIG_MAPPING

        architecture = ARCHITECTURES[self.name]
        values: dict[str, Any] = dict(architecture.fixed)
        for name, key in {**_SIZES, **architecture.sizes}.items():
            value = self.file.metadata.get(f"{self.name}.{key}")
            if value is None and name == "head_dim":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise CheckpointError(f"{self.where}: {self.name}.{key} is {value!r}")
            values[name] = value
        base = self.file.metadata.get(f"{self.name}.rope.freq_base", 10000.0)
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{self.where}: lacks token_embd.weight")
        if isinstance(tokens, ArrayOf) and tokens.count > embedding.shape[0]:
            raise CheckpointError(
                f"{self.where}: has {tokens.count} tokens, token_embd.weight {embedding.shape[0]}"
            )
        for name in ("bos", "eos", "pad"):
            key = f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id"
            values[f"{name}_token_id"] = self.file.metadata.get(key)
        return CONFIG_MAPPING[architecture.model_type](
            **values,
            vocab_size=embedding.shape[0],
            rope_parameters={"rope_type": "default", "rope_theta": float(base)},
            tie_word_embeddings="output.weight" not in self.file.tensors,
            dtype="bfloat16",
        )

    def rest(self, dtype: torch.dtype) -> dict[str, Any]:
        """Raises CheckpointError for a tensor of a type that cannot be read."""
        state: dict[str, Any] = {}
        for name in self.file.tensors:
            found = self._name_of(name)
            if found is not None:
                state[found] = self._value(name, dtype)
        return state

    def _name_of(self, name: str) -> str | None:
        """What Transformers calls a tensor; None for experts and what a model has no place for."""
        base, _, suffix = name.rpartition(".")
        if base in _WHOLE:
            return f"{_WHOLE[base]}.{suffix}"
        match = _IN_BLOCK.fullmatch(name)
        if match is None or match[2] not in _IN_LAYER:
            return None
        return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"

    def _value(self, name: str, dtype: torch.dtype) -> Any:
        tensor = self.file.tensors[name]
        if tensor.is_floats:
            value = self.file.read(name)
            return value[None] if "ffn_gate_inp_shexp" in name and value.dim() == 1 else value
        base = name.rpartition(".")[0]
        try:
            scheme = self.quantization.scheme(base)
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        if scheme is None or len(tensor.shape) != 2:
            raise CheckpointError(f"{self.where}: {name} is {tensor.type.name} {tensor.shape}")
        matrix = Matrix(name=base, N=tensor.shape[0], K=tensor.shape[1])
        return LazyMatrix(scheme, matrix, lambda: {"weight": self.file.read(name)}, dtype)
