"""The keys of a GGUF file, below its architecture's name, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fusedmoe.checkpoint import CheckpointError
from fusedmoe.weights.gguf_file import ArrayOf
from fusedmoe.weights.gguf_parts import GgufParts

FREQUENCIES = "rope_freqs.weight"
# Counts of what a model need not have.
_MAY_BE_ZERO = {
    "leading_dense_block_count",
    "expert_shared_count",
    "nextn_predict_layers",
    "embedding_length_per_layer_input",
    "attention.shared_kv_layers",
}
_YARN = {
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


class Header:
    """``architecture`` is what its keys begin with. Errors are CheckpointErrors naming the key."""

    def __init__(self, file: GgufParts, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def get(self, key: str) -> Any:
        """As the file has it; None where it has none."""
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def wrong(self, key: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {self.architecture}.{key} is {self.get(key)!r}")

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive number; ``default`` where there is none, which is an error without it."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or value < (0 if key in _MAY_BE_ZERO else 1e-30):
            raise self.wrong(key)
        return value

    def value(self, key: str) -> Any:
        """A flag, a positive number, or None."""
        value = self.get(key)
        return value if value is None or isinstance(value, bool) else self.number(key)

    def of_layers(self, key: str) -> tuple[Any, ...]:
        """What a key says of each layer; a single number or flag is that of all."""
        found = self.get(key)
        if isinstance(found, ArrayOf) and found.values and found.count >= self.num_layers:
            return found.values[: self.num_layers]
        if not isinstance(found, bool | int | float):
            raise self.wrong(key)
        return (found,) * self.num_layers

    def count(self, key: str) -> int:
        """A whole number, 1 or more; where it is given for each layer, the largest."""
        found = self.get(key)
        value = max(self.of_layers(key)) if isinstance(found, ArrayOf) else self.number(key)
        if not isinstance(value, int) or value < 1:
            raise self.wrong(key)
        return value

    def numbers(self, tensor: str) -> torch.Tensor:
        """A vector of floats that belongs to the configuration."""
        found = self.file.tensors.get(tensor)
        if found is None or not found.is_floats or len(found.shape) != 1:
            what = "lacks it" if found is None else f"is {found.type.name} {found.shape}"
            raise CheckpointError(f"{self.file.path}: {tensor}: {what}")
        return self.file.read(tensor).double()

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    @property
    def num_layers(self) -> int:
        """Of the model, without those behind its last, which guess further tokens."""
        count = self.number("block_count") - self.number("nextn_predict_layers", 0)
        if not 1 <= count <= len(self.file.tensors):
            raise self.wrong("block_count")
        return int(count)

    @property
    def head_dim(self) -> int:
        heads = self.count("attention.head_count")
        if self.get("attention.key_length") is not None:
            return self.count("attention.key_length")
        return self.count("embedding_length") // heads


def plain_rope(header: Header) -> dict[str, Any]:
    """All columns of a head are turned, as fast as the header says."""
    base = {"rope_theta": float(header.number("rope.freq_base", 10000.0))}
    kind = header.get("rope.scaling.type")
    factor = float(header.number("rope.scaling.factor", 1.0))
    if kind == "none" or (kind is None and factor == 1):
        return base | {"rope_type": "default"}
    if kind in (None, "linear"):
        return base | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise header.wrong("rope.scaling.type")
    found = {name: header.value(key) for name, key in _YARN.items()}
    return base | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(
            header.number("rope.scaling.original_context_length")
        ),
        **{name: float(value) for name, value in found.items() if value is not None},
    }


def smooth_rope(header: Header) -> dict[str, Any]:
    """YaRN whose ramp between turned and stretched columns has no whole bounds."""
    found = plain_rope(header)
    return found | {"truncate": False} if found["rope_type"] == "yarn" else found


def partial_rope(header: Header) -> dict[str, Any]:
    """As many columns of a head are turned as the header says."""
    turned = header.number("rope.dimension_count", header.head_dim)
    return plain_rope(header) | {"partial_rotary_factor": turned / header.head_dim}


def sliding_layers(header: Header) -> list[str]:
    """The kind of each layer's attention, where windows alternate with whole sequences."""
    pattern = header.of_layers("attention.sliding_window_pattern")
    return ["sliding_attention" if sliding else "full_attention" for sliding in pattern]


def attention_bias(header: Header) -> Mapping[str, Any]:
    """A field that the header leaves to the tensors."""
    return {"attention_bias": header.has("blk.0.attn_q.bias")}
