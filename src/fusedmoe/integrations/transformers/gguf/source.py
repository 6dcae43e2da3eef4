"""A GGUF file as the source of a Transformers model: its configuration, its tensors' names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.checkpoint import CONFIG_NAME, CheckpointError
from fusedmoe.integrations.transformers.gguf.architecture import Architecture
from fusedmoe.integrations.transformers.gguf.header import Header
from fusedmoe.integrations.transformers.gguf.rows import ARCHITECTURES, architecture_of
from fusedmoe.integrations.transformers.gguf.steps import Join
from fusedmoe.integrations.transformers.sources import LazyTensor
from fusedmoe.quantization.dialects import LayerSchemes, Matrix
from fusedmoe.quantization.dialects.base import read_matrix
from fusedmoe.quantization.dialects.gguf import GgufQuantization
from fusedmoe.weights.checkpoint_experts import ExpertLayer, ExpertTensor
from fusedmoe.weights.families import Part, read_sizes
from fusedmoe.weights.gguf_file import ArrayOf
from fusedmoe.weights.gguf_parts import GgufParts, paths_of
from fusedmoe.words import STORED_DTYPES

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# All experts of a projection, or, in files of before 2024-04, one: ffn_gate.3.weight.
_OF_EXPERTS = re.compile(
    r"ffn_(gate|up|down|gate_up)(?:_exps|\.(\d+))\.(weight|bias|scale|input_scale)"
)
_SCALES = ("scale", "input_scale")  # of a matrix in NVFP4
_PARTS: Mapping[str, Part] = {"gate": "gate", "up": "up", "down": "down", "gate_up": "gate_up"}


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

    strict = True  # what has no place in the model would change its numbers

    def __init__(self, path: Path, *, any_architecture: bool = False) -> None:
        self.file = GgufParts(path)
        name = self.file.metadata.get("general.architecture")
        self.name = str(name)
        self.header = Header(self.file, self.name)
        self.problem: str | None = None
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            self.problem = f"{path}: the architecture is {name!r}; known: {known}"
            if not any_architecture:
                raise CheckpointError(self.problem)
        types = {
            tensor.name.rpartition(".")[0]: tensor.type.name
            for tensor in self.file.tensors.values()
            if tensor.name.endswith(".weight")
        }
        self._scales = self._find_scales(types)
        scaled = (scale.rpartition(".") for scale in self._scales)
        self.quantization = GgufQuantization(
            types=types, scaled=frozenset(base for base, _, suffix in scaled if suffix == "scale")
        )
        self.layers = self._expert_layers()

    @property
    def where(self) -> Path:
        return self.file.path

    @property
    def architecture(self) -> Architecture:
        found = architecture_of(self.header)
        assert found is not None
        return found

    def _find_scales(self, types: Mapping[str, str]) -> frozenset[str]:
        """Tensors that belong to a matrix in NVFP4, and are nothing that the architecture names."""
        known = architecture_of(self.header)
        found: set[str] = set()
        for name in self.file.tensors:
            base, _, suffix = name.rpartition(".")
            if suffix in _SCALES and types.get(base) == "NVFP4":
                block = _BLOCK.fullmatch(name)
                if known is None or block is None or block[2] not in known.names:
                    found.add(name)
        return frozenset(found)

    def _expert_layers(self) -> dict[tuple[str, int], ExpertLayer]:
        count = None if self.header.get("block_count") is None else self.header.num_layers
        layers: dict[tuple[str, int], ExpertLayer] = {}
        for name in self.file.tensors:
            block = _BLOCK.fullmatch(name)
            match = None if block is None else _OF_EXPERTS.fullmatch(block[2])
            if block is None or match is None or (count is not None and int(block[1]) >= count):
                continue
            if match[3] in _SCALES and name not in self._scales:
                continue
            number, expert = int(block[1]), None if match[2] is None else int(match[2])
            layer = layers.setdefault(("model.", number), ExpertLayer("model.", number))
            layer.tensors.append(ExpertTensor(name, _PARTS[match[1]], expert, match[3]))
        if not layers:
            raise CheckpointError(f"{self.where}: no tensor has the name of experts")
        return dict(sorted(layers.items()))

    def schemes(self, layer: ExpertLayer) -> LayerSchemes | None:
        return layer.schemes(self.quantization, self.where)

    def num_experts(self, layer: ExpertLayer) -> int:
        """As many as its tensors have."""
        found = {t.expert for t in layer.tensors}
        return self.shape(layer.tensors[0].name)[0] if None in found else len(found)

    def layer_facts(self) -> dict[str, Any]:
        """What describes a layer's experts. CheckpointError where a size is unknown."""
        layer = next(iter(self.layers.values()))
        downs = [t for t in layer.tensors if t.part == "down" and t.suffix == "weight"]
        if not downs:
            raise CheckpointError(f"{self.where}: {layer.name} has no down projection")
        down, shape = downs[0], self.shape(downs[0].name)
        if len(shape) != (3 if down.expert is None else 2):
            raise CheckpointError(f"{self.where}: {down.name} is {shape}")
        return {
            "num_experts": self.num_experts(layer),
            "hidden_size": shape[-2],
            "intermediate_size": shape[-1],
            "top_k": int(self.header.number("expert_used_count")),
            "activation": MoEActivation.from_str(self.architecture.activation),
            "bias": any(tensor.suffix == "bias" for tensor in layer.tensors),
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[name].shape

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        tensor = self.file.read(name)  # of a mapped file: what is not looked at is not read
        return tensor if rows is None else tensor[rows.start : rows.stop]

    def config(self) -> Any:
        from transformers import CONFIG_MAPPING

        values = self.architecture.config(self.header)
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
        values |= {
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "dtype": "bfloat16",
        }
        try:
            config = CONFIG_MAPPING[self.architecture.model_type](**values)
        except Exception as error:  # a header that makes no sense fails in as many ways
            raise CheckpointError(f"{self.where}: Transformers refuses it: {error}") from error
        facts, said = self.layer_facts(), read_sizes(config)._asdict()
        for name in ("num_experts", "intermediate_size"):
            if facts[name] != said[name]:
                raise CheckpointError(
                    f"{self.where}: the experts' tensors have {name} {facts[name]}, the header "
                    f"says {said[name]}"
                )
        return config

    def find_problem(self) -> str | None:
        """What keeps the file from being loaded as a model, as far as its headers tell."""
        try:
            if self.problem is None:
                self.architecture.config(self.header)
                self.rest(torch.bfloat16)
        except CheckpointError as error:
            return str(error)
        return self.problem

    def rest(self, dtype: torch.dtype) -> dict[str, Any]:
        """Raises CheckpointError for a tensor of a type that cannot be read, or without a place."""
        state: dict[str, Any] = {}
        layers: dict[int, dict[str, str]] = {}
        for name in self.file.tensors:
            block = _BLOCK.fullmatch(name)
            if name in self._scales:
                continue
            found = self.architecture.name_of_whole(name)
            if block is not None:
                layers.setdefault(int(block[1]), {})[block[2]] = name
            elif found is not None:
                state[found] = self._turned(name, name, dtype)
            elif name not in self.architecture.read_by_rope:
                raise self._no_place(name)
        for number in range(self.header.num_layers):
            state |= self._layer(f"model.layers.{number}.", layers.get(number, {}), dtype)
        return state

    def _layer(self, prefix: str, names: dict[str, str], dtype: torch.dtype) -> dict[str, Any]:
        """A layer's tensors but for its experts; ``names`` are full names by those below it."""
        architecture = self.architecture
        state: dict[str, Any] = {}
        for target, join in architecture.joined.items():
            if any(part in names for part in join.parts):
                state[prefix + target] = self._joined(join, prefix, names, dtype)
        joined = {part for join in architecture.joined.values() for part in join.parts}
        for below, name in names.items():
            match = _OF_EXPERTS.fullmatch(below)
            if below in joined or (match is not None and match[3] not in _SCALES):
                continue
            found = architecture.name_of(below)
            if found is None:
                raise self._no_place(name)
            state[prefix + found] = self._turned(below, name, dtype)
        return state

    def _joined(
        self, join: Join, prefix: str, names: dict[str, str], dtype: torch.dtype
    ) -> LazyTensor:
        lacking = [part for part in join.parts if part not in names]
        if lacking:
            raise CheckpointError(f"{self.where}: {prefix} lacks {lacking[0]}")
        values = [self._value(names[part], dtype) for part in join.parts]
        return LazyTensor(lambda: join.make(self.header, *(v[...] for v in values)), dtype)

    def _turned(self, below: str, name: str, dtype: torch.dtype) -> Any:
        value = self._value(name, dtype)
        turn = self.architecture.turn_of(below)
        if turn is None:
            return value
        tensor = self.file.tensors[name]
        stored = STORED_DTYPES[tensor.type.name] if tensor.is_floats else dtype
        return LazyTensor(lambda: turn(self.header, value[...]), stored)

    def _value(self, name: str, dtype: torch.dtype) -> Any:
        """Floats as they are stored; what is packed becomes ``dtype``."""
        tensor = self.file.tensors[name]
        if tensor.is_floats:
            return self.file.read(name)
        base = name.rpartition(".")[0]
        try:
            scheme = self.quantization.scheme(base)
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        if scheme is None or len(tensor.shape) < 2:
            raise CheckpointError(f"{self.where}: {name} is {tensor.type.name} {tensor.shape}")
        matrix = Matrix(name=base, N=math.prod(tensor.shape[:-1]), K=tensor.shape[-1])

        def make() -> torch.Tensor:
            stored = {"weight": self.file.read(name).flatten(0, -2)}
            if base in self.quantization.scaled:
                stored["scale"] = self.file.read(f"{base}.scale")
            return read_matrix(scheme, stored, matrix).dequantize(dtype).view(tensor.shape)

        return LazyTensor(make, dtype)

    def _no_place(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {name} has no place in a {self.architecture.model_type} model"
        )
