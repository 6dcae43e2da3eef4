"""Where ``from_pretrained`` reads a model: a folder of safetensors, or a GGUF file.

A source knows the model's configuration, its layers of experts, and everything else as a lazy
state_dict under names that Transformers understands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fusedmoe.checkpoint import CheckpointError, TensorReader
from fusedmoe.quantization.dialects import LayerSchemes, Matrix, Scheme
from fusedmoe.quantization.dialects.base import read_matrix
from fusedmoe.quantization.dialects.online import OnlineQuantization
from fusedmoe.weights.checkpoint_experts import CheckpointExperts, ExpertLayer
from fusedmoe.weights.families import read_sizes
from fusedmoe.words import STORED_DTYPES, STORED_FLOATS

_STORED_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class Source(Protocol):
    """``where`` is for messages; ``layers`` are the model's, by (prefix, number).

    ``strict``: everything in the files has to have a place in the model.
    """

    strict: bool

    @property
    def where(self) -> Path: ...

    @property
    def layers(self) -> Mapping[tuple[str, int], ExpertLayer]: ...

    def schemes(self, layer: ExpertLayer) -> LayerSchemes | None:
        """How the layer is stored, and will be kept, after its tensors were checked by name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the files."""

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """A tensor of the files, or no more of it than ``rows`` of its first axis."""

    def config(self) -> Any:
        """The Transformers configuration, which does not say that the model is quantized."""

    def rest(self, dtype: torch.dtype) -> dict[str, Any]:
        """Everything but the experts; ``[...]`` reads a value, quantized matrices as ``dtype``."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of ``dtype`` that is made when it is read; it looks like a safetensors slice."""

    make: Callable[[], torch.Tensor]
    dtype: torch.dtype

    def get_dtype(self) -> str:
        return _STORED_NAMES[self.dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.make()[index]


def not_loaded(where: Path, error: Exception, hint: str = "") -> CheckpointError:
    """What Transformers says about ``where``; not its advice to run code from there."""
    why = str(error)
    if "trust_remote_code" in why:
        why = "its model is code in the folder (auto_map), and no code of a checkpoint runs here"
    return CheckpointError(f"{where}: Transformers cannot load it: {why}{hint}")


def is_linear(name: str) -> bool:
    """Whether a tensor is a weight or bias, which is floats unless a scheme says otherwise."""
    return name.endswith((".weight", ".bias"))


def turned_tensors(experts: CheckpointExperts, layer: ExpertLayer) -> set[str]:
    """The tensors of all experts that are [E, in, out] in some families, and [E, out, in] here.

    Files that Transformers has saved may be [E, out, in] all the same: the hidden size tells, where
    it is not both. What is packed is turned nowhere.
    """
    if not experts.family.fused_in_out:
        return set()
    hidden, entries = read_sizes(experts.checkpoint.config).hidden_size, experts.checkpoint.tensors
    stacks = [tensor for tensor in layer.tensors if tensor.expert is None]
    found: set[str] = set()
    for tensor in stacks:
        entry = entries[tensor.name]
        if tensor.suffix not in ("", "weight") or entry.dtype not in (*STORED_FLOATS, "F8_E4M3"):
            continue
        *_, rows, columns = (0, 0, *entry.shape)
        here, there = (rows, columns) if tensor.part == "down" else (columns, rows)
        if here != hidden or there == hidden:
            found.add(tensor.matrix)
    return {
        tensor.name
        for tensor in stacks
        if tensor.matrix in found and len(entries[tensor.name].shape) == 3
    }


class FolderSource:
    """A checked folder; ``online`` rounds experts that are stored as floats."""

    strict = False  # files may hold more: multi-token prediction, vision towers

    def __init__(
        self, experts: CheckpointExperts, online: OnlineQuantization | None = None
    ) -> None:
        self.experts, self.online = experts, online
        self.reader = TensorReader(experts.checkpoint)
        packed = (experts.schemes(layer) for layer in experts.model_layers.values())
        if online and experts.quantization and any(scheme is not None for scheme in packed):
            raise CheckpointError(
                f"{self.where}: is quantized already ({experts.quantization.dialect}); rounding to "
                f"{online.format.name} is for experts of floats"
            )
        self._turned = {
            name for layer in experts.layers.values() for name in turned_tensors(experts, layer)
        }

    @property
    def where(self) -> Path:
        return self.experts.checkpoint.folder

    @property
    def layers(self) -> Mapping[tuple[str, int], ExpertLayer]:
        return self.experts.model_layers

    def schemes(self, layer: ExpertLayer) -> LayerSchemes | None:
        schemes = self.experts.schemes(layer)
        self.experts.check(layer, schemes)
        if self.online is None:
            return schemes
        names = [tensor.matrix for tensor in layer.tensors]
        return self.online.layer_schemes(names, names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.experts.checkpoint.tensors[name].shape

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        tensor: torch.Tensor = (
            self.reader(name) if rows is None else self.reader.slice(name)[rows.start : rows.stop]
        )
        return tensor.mT if name in self._turned else tensor

    def config(self) -> Any:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                self.where, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise not_loaded(self.where, error) from error
        for section in (config, config.get_text_config()):
            if getattr(section, "quantization_config", None) is not None:
                del section.quantization_config
        return config

    def rest(self, dtype: torch.dtype) -> dict[str, Any]:
        """Raises CheckpointError for what lacks its scale, or is no floats for no known reason."""
        of_experts = {t.name for layer in self.experts.layers.values() for t in layer.tensors}
        names = [name for name in self.experts.checkpoint.tensors if name not in of_experts]
        matrices = self._matrices(names)
        taken = {name for _, found in matrices.values() for name in found.values()}
        names = [name for name in names if name not in taken]
        self.experts.check_floats(name for name in names if is_linear(name))
        state: dict[str, Any] = {name: self.reader.slice(name) for name in names}
        for module, (scheme, found) in matrices.items():
            state[f"{module}.weight"] = self._matrix(module, scheme, found, dtype)
            if "bias" in found:
                state[f"{module}.bias"] = self.reader.slice(found["bias"])
        return state

    def _matrices(self, names: list[str]) -> dict[str, tuple[Scheme, dict[str, str]]]:
        """Linear layers that are quantized: module -> scheme and its tensors by suffix."""
        quantization, tensors = self.experts.quantization, self.experts.checkpoint.tensors
        if quantization is None:
            return {}
        found: dict[str, tuple[Scheme, dict[str, str]]] = {}
        schemes: dict[str, Scheme | None] = {}
        for name in names:
            module = name.rpartition(".")[0]
            if ".weight." in name:
                module = name.partition(".weight.")[0]
            if module not in schemes:
                schemes[module] = quantization.scheme(module)
            scheme = schemes[module]
            if scheme is not None and (parts := scheme.split(name)) and parts[0] == module:
                found.setdefault(module, (scheme, {}))[1][parts[1]] = name
        return {
            module: (scheme, stored)
            for module, (scheme, stored) in found.items()
            if not all(suffix in ("weight", "bias") for suffix in stored)
            or tensors[stored.get("weight", stored.get("bias", ""))].dtype not in STORED_FLOATS
        }

    def _matrix(
        self, module: str, scheme: Scheme, names: dict[str, str], dtype: torch.dtype
    ) -> LazyTensor:
        missing = sorted(scheme.missing(frozenset(names)))
        if missing:
            raise CheckpointError(
                f"{self.where}: lacks {module}.{missing[0]} beside {', '.join(sorted(names))} "
                f"({scheme.dialect}, {scheme.name})"
            )
        tensors = self.experts.checkpoint.tensors
        shapes = {suffix: tensors[name].shape for suffix, name in names.items()}
        try:
            size = scheme.size(shapes, lambda suffix: self.read(names[suffix]))
        except IndexError:  # a tensor has fewer axes than a matrix
            size = None
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {module}.{error}") from None
        if size is None:
            raise CheckpointError(
                f"{self.where}: the tensors of {module}, {shapes}, hold no matrix"
            )
        stored = {suffix: name for suffix, name in names.items() if suffix != "bias"}
        matrix = Matrix(name=module, N=size[0], K=size[1])

        def make() -> torch.Tensor:
            parts = {suffix: self.read(name) for suffix, name in stored.items()}
            return read_matrix(scheme, parts, matrix).dequantize(dtype)

        return LazyTensor(make, dtype)
