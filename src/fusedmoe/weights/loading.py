"""Checkpoint tensors into the parameters of RoutedExperts: find, convert, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from fusedmoe.weights.param_spec import BIASES, WEIGHTS, ParamSpec, ShardId, load_shard
from fusedmoe.weights.params_mapping import (
    CheckpointNames,
    ExpertNameParser,
    ExpertParamEntry,
    ExpertParamsTable,
    ExpertTensorName,
)
from fusedmoe.weights.stored import MatrixKey, StoredTensors, fit
from fusedmoe.weights.stored_layout import StoredLayout

if TYPE_CHECKING:
    from fusedmoe.quantization.dialects.base import Matrix, Rule
    from fusedmoe.weights.routed_experts import RoutedExperts


_FLOATS = {spec.name: spec for spec in WEIGHTS + BIASES}


@dataclass(frozen=True)
class LoadReport:
    """(parameter, shard, global expert id) triples of this rank."""

    loaded: frozenset[tuple[str, ShardId, int]]
    missing: frozenset[tuple[str, ShardId, int]]

    def raise_if_missing(self, layer: str = "") -> None:
        if not self.missing:
            return
        first = [f"{name} {shard} of expert {e}" for name, shard, e in sorted(self.missing)[:4]]
        more = len(self.missing) - len(first)
        raise ValueError(
            f"{layer or 'this layer'} misses {len(self.missing)} of "
            f"{len(self.missing) + len(self.loaded)} expert tensors: {', '.join(first)}"
            + (f" and {more} more" if more else "")
        )


class ExpertLoader:
    """Loads one layer. ``transposed`` and ``interleaved`` are those of ``StoredLayout``."""

    def __init__(
        self,
        layer: RoutedExperts,
        *,
        ckpt_names: CheckpointNames,
        expert_mapping: Sequence[tuple[str, str, int, str]] | None,
        transposed: bool,
        interleaved: bool,
    ) -> None:
        self._layer = layer
        self._parser = ExpertNameParser(ckpt_names, layer.moe_config.is_act_and_mul)
        self._table = ExpertParamsTable(expert_mapping or ())
        count = layer.expert_map_manager.num_logical_experts
        self._layout = StoredLayout(layer.sizes, count, transposed, interleaved)
        self.forget()
        self._wanted = frozenset(
            (param_name, shard, expert)
            for param_name, spec in layer.param_specs.items()
            for shard in spec.shard_ids(layer.sizes)
            for expert in range(layer.moe_config.num_experts)
            if layer.expert_map_manager.local_row(expert) >= 0
        )

    def load(self, name: str, tensor: torch.Tensor) -> set[str]:
        """Load one checkpoint tensor; the names of the parameters it went to (on this rank)."""
        copies = self._table.find(name)
        if copies and self._stored is not None:
            return self._load_stored_copies(copies, name, tensor)
        if copies:
            return {
                param_name
                for entry, param_name in copies
                if self._load_slot(
                    param_name, tensor, name, cast("ShardId", entry.shard_id), entry.expert_id
                )
            }
        return self.load_part(self._parsed(name), name, tensor)

    def load_part(self, parsed: ExpertTensorName, name: str, tensor: torch.Tensor) -> set[str]:
        """As ``load``, where the caller knows what the tensor is."""
        layer = self._layer
        count = layer.expert_map_manager.num_logical_experts
        if parsed.expert is not None and not 0 <= parsed.expert < count:
            raise ValueError(f"{name}: expert {parsed.expert} of a layer that has {count}")
        placed = layer.expert_map_manager
        spec = self._spec_of_floats(parsed, name)
        if spec is None:
            replicas = None if parsed.expert is None else placed.replicas(parsed.expert)
            key = MatrixKey(parsed.expert, parsed.shards)
            return self._load_stored(key, parsed.suffix, name, tensor, replicas)
        written = set()
        for expert, shard, data in self._layout.pieces(parsed, spec, name, tensor):
            replicas = placed.replicas(expert)
            if self._stored is not None:
                key = MatrixKey(expert, (shard,))
                written |= self._load_stored(key, spec.suffix, name, data, replicas)
                continue
            for physical in replicas:
                if self._load_named(spec.name, data, name, shard, physical):
                    written.add(spec.name)
        return written

    def load_from_stack(self, name: str, expert: int, tensor: torch.Tensor) -> set[str]:
        """As ``load``, for what tensor ``name`` [experts, ...] holds of one logical expert."""
        parsed = self._parsed(name)
        if parsed.expert is not None:
            raise ValueError(f"{name} does not hold all experts")
        floats = self._spec_of_floats(parsed, name) is not None
        if floats and self._layout.transposed and tensor.dim() == 2:
            tensor = tensor.mT
        return self.load_part(parsed._replace(expert=expert), name, tensor)

    def experts_of(self, name: str) -> list[int] | None:
        """Logical experts that tensor ``name`` holds something of; None for all of them."""
        copies = self._table.find(name)
        if copies:
            count = self._layer.expert_map_manager.num_logical_experts
            return sorted({entry.expert_id % count for entry, _ in copies})
        expert = self._parsed(name).expert
        return None if expert is None else [expert]

    def _parsed(self, name: str) -> ExpertTensorName:
        parsed = self._parser.parse(name)
        if parsed is None:
            raise ValueError(f"{name} names no tensor of these experts")
        return parsed

    def is_local(self, expert: int) -> bool:
        """Whether a copy of a logical expert lives on this rank."""
        placed = self._layer.expert_map_manager
        return any(placed.local_row(copy) >= 0 for copy in placed.replicas(expert))

    def _load_stored_copies(
        self, copies: list[tuple[ExpertParamEntry, str]], name: str, tensor: torch.Tensor
    ) -> set[str]:
        """One stored tensor that a table of names assigns to experts."""
        entry, param_name = copies[0]
        shard = cast("ShardId", entry.shard_id)
        suffix = param_name.removeprefix("w2_" if shard == "w2" else "w13_")
        physical = [other.expert_id for other, _ in copies]
        for slot in physical:
            self._check_unmoved(slot, name)
        return self._load_stored(MatrixKey(physical[0], (shard,)), suffix, name, tensor, physical)

    def _load_stored(
        self,
        key: MatrixKey,
        suffix: str,
        name: str,
        tensor: torch.Tensor,
        physical: list[int] | None,
    ) -> set[str]:
        """One tensor as a quantized checkpoint stores it, for the experts ``physical`` (None: all).

        It is converted as soon as what belongs to it is there.
        """
        assert self._stored is not None
        layer = self._layer
        count = layer.expert_map_manager.num_logical_experts
        if physical is None and tensor.dim() == 0:
            tensor = tensor.expand(count)  # one scale for all experts
        if physical is None and tensor.shape[0] != count:
            raise ValueError(
                f"{name}: expected {count} experts along the first axis, found shape "
                f"{tuple(tensor.shape)}"
            )
        base, written = name.removesuffix(suffix).rstrip("._"), set()
        matrix = key.matrix(base, layer.sizes, self._stored.names(key))
        for rule, tensors in self._stored.add(key, base, suffix, name, tensor):
            if physical is not None:
                written |= self._convert(rule, matrix, key.shards, tensors, name, physical)
                continue
            for expert in range(count):
                one = tuple(stored[expert] for stored in tensors)
                replicas = layer.expert_map_manager.replicas(expert)
                written |= self._convert(rule, matrix, key.shards, one, name, replicas)
        return written

    def _convert(
        self,
        rule: Rule,
        matrix: Matrix,
        shards: tuple[ShardId, ...],
        tensors: tuple[torch.Tensor, ...],
        name: str,
        physical: list[int],
    ) -> set[str]:
        """Stored tensors of one expert's matrix to the parameters of its copies on this rank."""
        layer = self._layer
        if all(layer.expert_map_manager.local_row(expert) < 0 for expert in physical):
            return set()
        owner = "w2" if shards == ("w2",) else "w13"
        written = set()
        for suffix, part in rule.parts(matrix, tensors).items():
            spec = self._spec_named(f"{owner}_{suffix}", name)
            part = fit(part, spec, layer.sizes, len(shards))
            pieces = self._layout.split(shards, spec, part, name)
            for shard, piece in zip(shards, pieces, strict=True):
                for expert in physical:
                    if self._load_named(spec.name, piece, name, shard, expert):
                        written.add(spec.name)
        return written

    def load_one(
        self,
        param: torch.Tensor,
        tensor: torch.Tensor,
        name: str,
        shard_id: ShardId,
        physical_id: int,
    ) -> bool:
        """Write one shard of one expert; False where the expert lives on another rank."""
        for param_name in self._layer.param_specs:
            if getattr(self._layer, param_name) is param:
                return self._load_slot(param_name, tensor, name, shard_id, physical_id)
        raise ValueError(f"{name}: the given parameter does not belong to this layer")

    def _load_slot(
        self, param_name: str, tensor: torch.Tensor, name: str, shard_id: ShardId, physical_id: int
    ) -> bool:
        """``_load_named``, where the caller says which slot the tensor belongs to."""
        self._check_unmoved(physical_id, name)
        return self._load_named(param_name, tensor, name, shard_id, physical_id)

    def _check_unmoved(self, physical_id: int, name: str) -> None:
        if self._layer.expert_map_manager.is_moved(physical_id):
            raise ValueError(
                f"{name}: balancing has put another expert into slot {physical_id}; load_weights "
                "without an expert_mapping finds where experts are"
            )

    def _load_named(
        self, param_name: str, tensor: torch.Tensor, name: str, shard_id: ShardId, physical_id: int
    ) -> bool:
        layer, spec = self._layer, self._spec_named(param_name, name)
        row = layer.expert_map_manager.local_row(physical_id)
        if row < 0:
            return False
        param = getattr(layer, param_name)
        if param.device.type == "meta":
            raise ValueError(f"{name}: {param_name} is on 'meta'; call to_empty(device=...) first")
        layer.quant_method.before_writing(layer, param_name, row)
        with torch.no_grad():
            load_shard(param[row], tensor, spec, shard_id, layer.sizes, name)
        self._loaded.add((param_name, shard_id, physical_id))
        return True

    def _spec_of_floats(self, parsed: ExpertTensorName, name: str) -> ParamSpec | None:
        """What a tensor is that lies in files as ``StoredLayout`` says; None: as its dialect does.

        Gate and up that are joined are taken apart before they are rounded to a format.
        """
        owner = "w2" if parsed.shards == ("w2",) else "w13"
        if self._stored is None:
            return self._spec_named(f"{owner}_{parsed.suffix}", name)
        scheme = self._stored.scheme(MatrixKey(parsed.expert, parsed.shards))
        return _FLOATS.get(f"{owner}_{scheme.suffix(parsed.suffix)}") if scheme.floats else None

    def _spec_named(self, param_name: str, name: str) -> ParamSpec:
        spec = self._layer.param_specs.get(param_name)
        if spec is None:
            raise ValueError(
                f"{name}: this layer has no parameter {param_name}, only "
                f"{', '.join(self._layer.param_specs)}"
            )
        return spec

    def forget(self) -> None:
        """Count as missing what has been loaded so far."""
        schemes = self._layer.quant_method.checkpoint_schemes
        self._stored = None if schemes is None else StoredTensors(schemes)
        self._loaded: set[tuple[str, ShardId, int]] = set()

    @property
    def is_complete(self) -> bool:
        """Whether everything has come, and what came again did so with all that belongs to it."""
        return len(self._loaded) == len(self._wanted) and not self.missing_stored()

    def missing_stored(self) -> list[str]:
        """Names of tensors that are missing beside others of the same matrix."""
        return [] if self._stored is None else self._stored.missing()

    def report(self) -> LoadReport:
        return LoadReport(frozenset(self._loaded), self._wanted - self._loaded)
