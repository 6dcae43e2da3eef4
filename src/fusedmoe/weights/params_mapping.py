"""From checkpoint names to parameters: the per-expert table, and the parser of tensor names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from fusedmoe.weights.param_spec import ShardId

CheckpointNames = tuple[str, str, str | None]
DEFAULT_CHECKPOINT_NAMES: CheckpointNames = ("gate_proj", "down_proj", "up_proj")
FUSED_GATE_UP_NAME = "gate_up_proj"


class ExpertParamEntry(NamedTuple):
    """Tensors whose name contains ``weight_name`` belong to shard ``shard_id`` of physical expert
    ``expert_id``; the parameter's name has ``param_name`` in the place of ``weight_name``."""

    param_name: str
    weight_name: str
    expert_id: int
    shard_id: str


def fused_moe_make_expert_params_mapping(
    model: nn.Module | None,
    ckpt_gate_proj_name: str,
    ckpt_down_proj_name: str,
    ckpt_up_proj_name: str | None,
    num_experts: int,
    num_redundant_experts: int = 0,
    routed_experts_prefix: str = "routed_experts",
) -> list[ExpertParamEntry]:
    """One entry per expert, shard and copy: names such as ``experts.3.gate_proj.``.

    Redundant copies follow the ``num_experts`` logical experts and repeat them in turn. Without an
    up projection (``None`` or ``""``) only w1 and w2 are listed. ``model``, if given, says whether
    its layer sits under ``experts.<routed_experts_prefix>`` or directly under ``experts``.
    """
    if num_experts < 1 or num_redundant_experts < 0:
        raise ValueError(
            f"num_experts {num_experts} must be at least 1 and num_redundant_experts "
            f"{num_redundant_experts} at least 0"
        )
    nested = model is None or any(
        f".{routed_experts_prefix}." in f".{name}" for name, _ in model.named_parameters()
    )
    base = f"experts.{routed_experts_prefix}." if nested and routed_experts_prefix else "experts."
    shards = [("w1", ckpt_gate_proj_name), ("w2", ckpt_down_proj_name), ("w3", ckpt_up_proj_name)]
    return [
        ExpertParamEntry(
            f"{base}w2_" if shard_id == "w2" else f"{base}w13_",
            f"experts.{physical % num_experts}.{name}.",
            physical,
            shard_id,
        )
        for physical in range(num_experts + num_redundant_experts)
        for shard_id, name in shards
        if name
    ]


class ExpertTensorName(NamedTuple):
    """A parsed tensor name. ``expert`` None: all experts in one tensor. Several ``shards``: they
    are joined in one tensor, in that order. ``suffix`` is "weight" where the name has none."""

    expert: int | None
    shards: tuple[ShardId, ...]
    suffix: str


class ExpertNameParser:
    """Reads ``[path.]experts.[<id>.]<projection>[.<suffix> or _<suffix>]``.

    ``ckpt_names`` are (gate, down, up). With up None the first name holds gate and up joined where
    the activation is gated, the only projection where it is not; ``gate_up_proj`` is always
    understood as both joined.
    """

    def __init__(self, ckpt_names: CheckpointNames, gated: bool) -> None:
        if isinstance(ckpt_names, str) or len(ckpt_names) != 3:
            raise ValueError(f"ckpt_names are those of gate, down and up, got {ckpt_names!r}")
        gate, down, up = ckpt_names
        joined: tuple[ShardId, ...] = ("w1", "w3") if gated else ("w1",)
        self._shards: dict[str, tuple[ShardId, ...]] = {FUSED_GATE_UP_NAME: joined}
        if up and gated:
            self._shards |= {gate: ("w1",), up: ("w3",)}
        else:
            self._shards[gate] = joined
        self._shards[down] = ("w2",)
        # The longest first, because one name may begin with another (linear, linear_1).
        names = "|".join(re.escape(n) for n in sorted(self._shards, key=len, reverse=True))
        self._pattern = re.compile(
            rf"(?:(?:.*\.)?(?:routed_)?experts\.)?(?:(\d+)\.)?({names})(?:[._]([\w.]+))?"
        )

    def parse(self, name: str) -> ExpertTensorName | None:
        """None where ``name`` is no expert's tensor."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        expert, projection, suffix = match.groups()
        return ExpertTensorName(
            None if expert is None else int(expert), self._shards[projection], suffix or "weight"
        )


class ExpertParamsTable:
    """Looks up tensor names in a list of entries, as the function above makes one."""

    def __init__(self, mapping: Sequence[tuple[str, str, int, str]]) -> None:
        self._entries: dict[str, list[ExpertParamEntry]] = {}
        for row in mapping:
            entry = ExpertParamEntry(*row)
            self._entries.setdefault(entry.weight_name.rstrip("."), []).append(entry)

    def find(self, name: str) -> list[tuple[ExpertParamEntry, str]]:
        """(entry, name of the parameter alone) for every copy the tensor ``name`` belongs to."""
        parts = name.split(".")
        for start in range(len(parts)):
            for stop in range(len(parts), start, -1):
                entries = self._entries.get(".".join(parts[start:stop]))
                if entries:
                    suffix = ".".join(parts[stop:])
                    return [(e, (e.param_name + suffix).rpartition(".")[2]) for e in entries]
        return []
