"""``fusedmoe inspect``: what a checkpoint's MoE layers are, from config.json and headers alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from fusedmoe.checkpoint import Checkpoint, CheckpointError, TensorEntry, read_checkpoint
from fusedmoe.cli.facts import ModelFacts, model_facts, role_of
from fusedmoe.cli.layers import LayerFacts, moe_layers
from fusedmoe.cli.output import format_bytes, print_json, print_table, printable
from fusedmoe.integrations.transformers.gguf import GgufSource, gguf_of

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embeddings.weight")
HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint folder, or a GGUF file")


def run(args: argparse.Namespace) -> int:
    gguf = gguf_of(Path(args.checkpoint))
    if gguf is not None:
        return inspect_gguf(gguf, args.json)
    checkpoint = read_checkpoint(args.checkpoint)
    facts = model_facts(checkpoint)
    layers = moe_layers(checkpoint, facts)
    record = _record(checkpoint, facts, layers)
    if args.json:
        print_json(record)
    else:
        _print(record)
    return 0


def inspect_gguf(path: Path, as_json: bool) -> int:
    """The layers of a GGUF file, as loading would understand them."""
    source = GgufSource(path, any_architecture=True)
    rows: list[dict[str, Any]] = []
    problem = source.find_problem()
    for layer in source.layers.values():
        found = [source.file.tensors[tensor.name] for tensor in layer.tensors]
        row: dict[str, Any] = {
            "layer": layer.name,
            "experts": source.num_experts(layer),
            "format": " + ".join(dict.fromkeys(tensor.type.name.lower() for tensor in found)),
            "dialect": "gguf",
            "problem": problem,
            "expert_bytes": sum(tensor.nbytes for tensor in found),
        }
        try:
            schemes = source.schemes(layer)
            if schemes is not None:
                row |= {"format": schemes.name, "dialect": schemes.describe()["dialect"]}
        except CheckpointError as error:
            row["problem"] = str(error)
        rows.append(row)
    record = {
        "checkpoint": str(path),
        "architecture": source.name,
        "model_type": None if source.problem else source.architecture.model_type,
        "bytes": source.file.nbytes,
        "expert_bytes": sum(row["expert_bytes"] for row in rows),
        "moe_layers": rows,
    }
    if as_json:
        print_json(record)
        return 0
    print(f"{'architecture':<20}{printable(source.name)}")
    print(f"{'model type':<20}{record['model_type'] or 'not in the table'}")
    print(f"{'stored':<20}{format_bytes(record['bytes'])}")
    print(f"{'  in experts':<20}{format_bytes(record['expert_bytes'])}\n")
    columns = ("layer", "experts", "format", "dialect", "expert_bytes")
    print_table(
        ["layer", "experts", "format", "dialect", "experts hold"],
        [[*(row[c] for c in columns[:-1]), format_bytes(row["expert_bytes"])] for row in rows],
    )
    _print_problems(rows)
    return 0


def _print_problems(rows: list[dict[str, Any]]) -> None:
    for problem in dict.fromkeys(row["problem"] for row in rows if row["problem"]):
        print(f"\nit would not load: {printable(problem)}")


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
    outside = [e for e in checkpoint.tensors.values() if role_of(e.name, facts.family) is None]
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


def _print(record: dict[str, Any]) -> None:
    def line(what: str, value: Any) -> None:
        print(f"{what:<20}{'not in config.json' if value is None else printable(str(value))}")

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
            row["dialect"],
            row["activation"],
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
        [
            "layers",
            "count",
            "experts",
            "format",
            "dialect",
            "activations",
            "experts hold",
            "shared",
            "router",
            "per token",
        ],
        rows,
    )
    _print_problems(record["moe_layers"])
