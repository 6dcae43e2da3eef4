"""``fusedmoe inspect``: what a checkpoint's MoE layers are, from config.json and headers alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from fusedmoe.checkpoint import Checkpoint, TensorEntry, read_checkpoint
from fusedmoe.cli.facts import ModelFacts, model_facts
from fusedmoe.cli.output import format_bytes, print_json, print_table
from fusedmoe.weights.families import EXPERT_PARTS, CheckpointFamily, TensorRole

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embeddings.weight")
HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")


@dataclass
class LayerFacts:
    """One MoE layer of the files. Bytes are as stored, scales and biases included."""

    layer: str
    experts: int = 0
    format: str = ""
    expert_bytes: int = 0
    shared_bytes: int = 0
    router_bytes: int = 0
    leaves: dict[str, set[str]] = field(default_factory=dict, repr=False)

    def bytes_per_token(self, top_k: int | None) -> int | None:
        """Bytes that one token alone reads: top_k experts, the shared ones and the router."""
        if top_k is None or not self.experts:
            return None
        routed = self.expert_bytes * min(top_k, self.experts) // self.experts
        return routed + self.shared_bytes + self.router_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint folder")


def run(args: argparse.Namespace) -> int:
    checkpoint = read_checkpoint(args.checkpoint)
    facts = model_facts(checkpoint)
    layers = moe_layers(checkpoint, facts)
    record = _record(checkpoint, facts, layers)
    if args.json:
        print_json(record)
    else:
        _print(record, facts)
    return 0


def moe_layers(checkpoint: Checkpoint, facts: ModelFacts) -> list[LayerFacts]:
    """The MoE layers in the order of their numbers; those of a second stack carry its prefix."""
    found: dict[tuple[str, int], LayerFacts] = {}
    expert_ids: dict[tuple[str, int], set[int]] = {}
    for entry in checkpoint.tensors.values():
        role = _role(entry.name, facts.family)
        if role is None:
            continue
        key = (role.prefix, role.layer)
        layer = found.setdefault(key, LayerFacts(f"{role.prefix}layers.{role.layer}"))
        if role.part in EXPERT_PARTS:
            layer.expert_bytes += entry.nbytes
            layer.leaves.setdefault(role.leaf, set()).add(entry.dtype)
            if role.expert is not None:
                expert_ids.setdefault(key, set()).add(role.expert)
            elif len(entry.shape) >= 3:
                layer.experts = max(layer.experts, entry.shape[0])
        elif role.part in ("shared", "shared_gate", "latent"):
            layer.shared_bytes += entry.nbytes
        else:
            layer.router_bytes += entry.nbytes
    for key, layer in found.items():
        ids = expert_ids.get(key)
        layer.experts = len(ids) if ids else layer.experts or facts.sizes.num_experts or 0
        layer.format = storage_format(layer.leaves, facts.quant_method)
    return [found[key] for key in sorted(found) if found[key].expert_bytes]


def _role(name: str, family: CheckpointFamily | None) -> TensorRole | None:
    """What a tensor is; in a family that the table lacks, only what is under ``experts``."""
    if family is not None:
        return family.classify(name)
    return _UNKNOWN.classify(name)


_UNKNOWN = CheckpointFamily(
    name="unknown",
    model_types=(),
    names={
        "up": tuple(
            f"{block}.experts.{{e}}.{leaf}"
            for block in ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
            for leaf in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
        ),
        "router": ("mlp.gate", "block_sparse_moe.gate", "feed_forward.router", "ffn.gate"),
    },
)


def storage_format(leaves: dict[str, set[str]], quant_method: str | None) -> str:
    """A short name for how experts are stored, from the names and dtypes of their tensors."""
    dtypes = set().union(*leaves.values())
    if "blocks" in leaves and "scales" in leaves:
        return "mxfp4"
    if "weight_scale_2" in leaves or "weight_global_scale" in leaves:
        return "nvfp4"
    if "qweight" in leaves:
        return f"{quant_method or 'packed'} int32"
    if "weight_packed" in leaves:
        return "pack-quantized int32"
    weights = leaves.get("weight", set()) or leaves.get("", set()) or dtypes
    name = "+".join(sorted(weights)).lower()
    if "weight_scale_inv" in leaves:
        return f"{name}, block scales"
    if "weight_scale" in leaves or "scale" in leaves:
        return f"{name}, scales"
    return name


def _other_bytes_per_token(entries: Iterable[TensorEntry]) -> int:
    """Weights outside the MoE layers; of an embedding that is not also the head, one row."""
    entries = list(entries)
    has_head = any(entry.name.endswith(HEADS) for entry in entries)
    total = 0
    for entry in entries:
        one_row = has_head and entry.name.endswith(EMBEDDINGS) and len(entry.shape) == 2
        total += entry.nbytes // max(entry.shape[0], 1) if one_row else entry.nbytes
    return total


def _record(checkpoint: Checkpoint, facts: ModelFacts, layers: list[LayerFacts]) -> dict[str, Any]:
    top_k = facts.sizes.top_k
    per_token = [layer.bytes_per_token(top_k) for layer in layers]
    outside = [e for e in checkpoint.tensors.values() if _role(e.name, facts.family) is None]
    other = _other_bytes_per_token(outside)
    known = [value for value in per_token if value is not None]
    rows = []
    for layer, touched in zip(layers, per_token, strict=True):
        row = asdict(layer) | {"bytes_per_token": touched}
        del row["leaves"]
        rows.append(row)
    return {
        "checkpoint": str(checkpoint.folder),
        "model_type": facts.model_type,
        "family": None if facts.family is None else facts.family.name,
        **facts.sizes._asdict(),
        "activation": facts.activation,
        "quant_method": facts.quant_method,
        "bytes": checkpoint.nbytes,
        "expert_bytes": sum(layer.expert_bytes for layer in layers),
        "bytes_per_token": sum(known) + other if len(known) == len(layers) else None,
        "other_bytes_per_token": other,
        "moe_layers": rows,
    }


def _print(record: dict[str, Any], facts: ModelFacts) -> None:
    def line(what: str, value: Any) -> None:
        print(f"{what:<20}{'not in config.json' if value is None else value}")

    line("model type", record["model_type"])
    line("family", record["family"] or "not in the table; read by tensor names")
    for key in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
        line(key.replace("_", " "), record[key])
    line("shared experts", record["num_shared_experts"] or "none in config.json")
    line("activation", record["activation"])
    line("quantization", record["quant_method"] or "none")
    line("stored", format_bytes(record["bytes"]))
    line("  in experts", format_bytes(record["expert_bytes"]))
    if record["bytes_per_token"] is not None:
        line("read per token", format_bytes(record["bytes_per_token"]))
    print()

    def facts_of(row: dict[str, Any]) -> tuple[Any, ...]:
        touched = row["bytes_per_token"]
        return (
            row["experts"],
            row["format"],
            format_bytes(row["expert_bytes"]),
            format_bytes(row["shared_bytes"]),
            format_bytes(row["router_bytes"]),
            "-" if touched is None else format_bytes(touched),
        )

    rows = []
    for same, group in groupby(record["moe_layers"], key=facts_of):
        names = [row["layer"] for row in group]
        label = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        rows.append([label, len(names), *same])
    print_table(
        ["layers", "count", "experts", "format", "experts hold", "shared", "router", "per token"],
        rows,
    )
