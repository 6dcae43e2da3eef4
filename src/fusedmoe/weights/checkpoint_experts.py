"""The experts in a checkpoint folder: which tensors belong to which layer, and what they store.

From config.json and the headers of the files alone; no tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fusedmoe.checkpoint import Checkpoint, CheckpointError, read_quantization_config
from fusedmoe.quantization.dialects import CheckpointQuantization, LayerSchemes, read_quantization
from fusedmoe.quantization.dialects.base import stored_name
from fusedmoe.weights.families import EXPERT_PARTS, CheckpointFamily, Part, family_of, read_sizes
from fusedmoe.weights.param_spec import ShardId
from fusedmoe.words import FLOATS, STORED_DTYPES, STORED_FLOATS

_PLAIN = frozenset(("", "weight", "bias"))


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of a layer: ``name`` in the files is ``matrix`` with ``suffix``."""

    name: str
    part: Part
    expert: int | None
    suffix: str

    @property
    def matrix(self) -> str:
        return self.name.removesuffix(self.suffix).rstrip("._") if self.suffix else self.name

    def shards(self, gated: bool) -> tuple[ShardId, ...]:
        """What the tensor holds; without a gate, "up" is w1."""
        if self.part == "down":
            return ("w2",)
        if self.part == "gate_up":
            return ("w1", "w3") if gated else ("w1",)
        return ("w3",) if self.part == "up" and gated else ("w1",)


@dataclass(frozen=True)
class ExpertLayer:
    """The tensors of one layer, under ``prefix`` and the layer's number."""

    prefix: str
    number: int
    tensors: list[ExpertTensor] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        return f"{self.prefix}layers.{self.number}"

    def schemes(self, quantization: CheckpointQuantization, where: Path) -> LayerSchemes | None:
        """How it is stored; None: as floats. CheckpointError where its matrices differ."""
        w13 = dict.fromkeys(t.matrix for t in self.tensors if t.part != "down")
        w2 = dict.fromkeys(t.matrix for t in self.tensors if t.part == "down")
        if not w13 or not w2:
            lacking = "down" if w13 else "up"
            raise CheckpointError(f"{where}: {self.name} has no {lacking} projection")
        try:
            return quantization.layer_schemes(list(w13), list(w2))
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True)
class CheckpointExperts:
    """All expert layers of a checkpoint. ``quantization`` None: ordinary floats throughout."""

    checkpoint: Checkpoint
    family: CheckpointFamily
    quantization: CheckpointQuantization | None
    layers: dict[tuple[str, int], ExpertLayer]

    @classmethod
    def read(
        cls, checkpoint: Checkpoint, family: CheckpointFamily | None = None
    ) -> CheckpointExperts:
        """Raises CheckpointError for an unknown family or quantization."""
        family = family or family_of(checkpoint.config)
        if family is None:
            model_type = checkpoint.config.get("model_type")
            raise CheckpointError(
                f"{checkpoint.folder}: no family in the table has model_type {model_type!r}: it "
                "has no experts, or they are not known"
            )
        layers = layers_of(checkpoint, family)
        leaves = _leaves(checkpoint, layers.values())
        config = read_quantization_config(checkpoint.folder, checkpoint.config)
        if config is not None and "expert_dtype" in checkpoint.config:
            config = {"expert_dtype": checkpoint.config["expert_dtype"]} | config
        try:
            quantization = None if config is None else read_quantization(config, leaves)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from None
        return cls(checkpoint, family, quantization, layers)

    @property
    def model_layers(self) -> dict[tuple[str, int], ExpertLayer]:
        """Without those behind the model's last, which guess further tokens.

        They may be stored as floats where all others are quantized, and no list says so.
        """
        count = read_sizes(self.checkpoint.config).num_layers
        if count is None:
            return self.layers
        return {key: layer for key, layer in self.layers.items() if layer.number < count}

    def schemes(self, layer: ExpertLayer) -> LayerSchemes | None:
        """How ``layer`` is stored; None: as floats. CheckpointError where its matrices differ."""
        if self.quantization is None:
            return None
        return layer.schemes(self.quantization, self.checkpoint.folder)

    def check(self, layer: ExpertLayer, schemes: LayerSchemes | None) -> None:
        """CheckpointError naming the first tensor that is missing or of another format."""
        if schemes is None:
            self.check_floats(tensor.name for tensor in layer.tensors)
            return
        found: dict[tuple[str, bool], dict[str, str]] = {}
        for tensor in layer.tensors:
            scheme = schemes.w2 if tensor.part == "down" else schemes.w13
            names = found.setdefault((tensor.matrix, tensor.part == "down"), {})
            names[scheme.suffix(tensor.suffix)] = tensor.name
        for (matrix, is_down), names in found.items():
            scheme, suffixes = schemes.w2 if is_down else schemes.w13, names.keys()
            what = f"{scheme.dialect} {scheme.name} experts"
            unknown = sorted(suffixes - scheme.known)
            missing = sorted(scheme.missing(frozenset(suffixes)))
            if missing:
                lacking = stored_name(matrix, missing[0], names.values())
                raise CheckpointError(
                    f"{self.checkpoint.folder}: lacks {lacking}, which {what} have; "
                    f"found {', '.join(sorted(suffixes))}"
                )
            if unknown:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {names[unknown[0]]} is no tensor of {what}, "
                    f"which have {', '.join(sorted(scheme.known))}"
                )

    def check_floats(self, names: Iterable[str]) -> None:
        """CheckpointError for tensors that are stored as something else."""
        for name in names:
            entry = self.checkpoint.tensors[name]
            if entry.dtype not in STORED_FLOATS:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {name} is {entry.dtype}, but config.json names no "
                    "quantization for it"
                )


def _leaves(checkpoint: Checkpoint, layers: Iterable[ExpertLayer]) -> dict[str, torch.dtype]:
    """dtypes by suffix: of the experts or, where these are floats, of other packed layers."""
    suffixes = {tensor.name: tensor.suffix for layer in layers for tensor in layer.tensors}
    if _PLAIN.issuperset(suffixes.values()):
        others: dict[str, dict[str, str]] = {}
        for name in checkpoint.tensors.keys() - suffixes.keys():
            head, inside, tail = name.partition(".weight.")
            module, suffix = (head, f"weight.{tail}") if inside else name.rpartition(".")[::2]
            others.setdefault(module, {})[name] = suffix
        for found in others.values():
            if not _PLAIN.issuperset(found.values()):
                suffixes |= found
    leaves: dict[str, torch.dtype] = {}
    for name, suffix in suffixes.items():
        dtype = STORED_DTYPES.get(checkpoint.tensors[name].dtype)
        if dtype is not None:
            known = leaves.setdefault(suffix, dtype)
            if known in FLOATS and dtype in FLOATS:  # scales: one dtype that holds them all
                leaves[suffix] = torch.promote_types(known, dtype)
    return leaves


def layers_of(
    checkpoint: Checkpoint, family: CheckpointFamily
) -> dict[tuple[str, int], ExpertLayer]:
    """The layers that have experts, in the order of their numbers."""
    found: dict[tuple[str, int], ExpertLayer] = {}
    for name in checkpoint.tensors:
        located = family.locate(name)
        if located is None or located[0].part not in EXPERT_PARTS:
            continue
        role, suffix = located
        layer = found.setdefault((role.prefix, role.layer), ExpertLayer(role.prefix, role.layer))
        layer.tensors.append(ExpertTensor(name, role.part, role.expert, suffix))
    return dict(sorted(found.items()))
