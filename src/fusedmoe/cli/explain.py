"""``fusedmoe explain``: which implementations run a layer, and why not the others."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from fusedmoe.cli.arguments import SIZES, add_sizes, device_of, dtype_of, experts_of, sizes_of
from fusedmoe.cli.facts import model_facts
from fusedmoe.cli.layers import moe_layers
from fusedmoe.cli.output import print_json
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.weights.families import EXPERT_PARTS

STORED_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint folder; or give the sizes")
    add_sizes(parser)
    parser.add_argument("--activation", metavar="NAME", help="silu where nothing else is known")
    parser.add_argument("--bias", action="store_true", help="the experts have biases")
    parser.add_argument("--dtype", default="auto", help="fp32, fp16, bf16; auto: the checkpoint's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; cuda where there is one")
    parser.add_argument(
        "--experts", metavar="NAME", help="force an implementation, by name or module:Class"
    )
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--tuned-table", metavar="FILE", help="tiles that fusedmoe tune measured")


def run(args: argparse.Namespace) -> int:
    from fusedmoe.selection import explain
    from fusedmoe.tuning.choice import source_of_tiles

    config = layer_config(args)
    selection = explain(config)
    tiles = source_of_tiles(config) if selection.chosen.name == "triton" else None
    if args.json:
        layer = {
            name: value.value if isinstance(value, MoEActivation) else str(value)
            for name, value in _described(config).items()
        }
        print_json(
            {
                "layer": layer,
                "experts": selection.chosen.name or selection.chosen.__name__,
                "candidates": [asdict(candidate) for candidate in selection.candidates],
                "tiles": tiles,
            }
        )
        return 0
    print(", ".join(f"{name} {_text(value)}" for name, value in _described(config).items()))
    print(selection)
    if tiles is not None:
        print(f"tiles: {tiles}")
    return 0


def layer_config(args: argparse.Namespace) -> FusedMoEConfig:
    """The layer that the arguments describe, those of a checkpoint under what is given."""
    known = {} if args.checkpoint is None else _from_checkpoint(read_checkpoint(args.checkpoint))
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    sizes = sizes_of(known | given)
    activation = known.get("activation")
    if args.activation is not None or activation is None:
        activation = MoEActivation.from_str(args.activation or "silu")
    return FusedMoEConfig(
        num_experts=sizes.num_experts,
        num_local_experts=sizes.num_experts,
        experts_per_token=sizes.top_k,
        hidden_dim=sizes.hidden_size,
        intermediate_size_per_partition=sizes.intermediate_size,
        activation=activation,
        in_dtype=dtype_of(args.dtype) or known.get("dtype", torch.bfloat16),
        device=device_of(args.device),
        has_bias=args.bias or known.get("bias", False),
        options=MoEOptions(
            experts=experts_of(args.experts),
            batch_invariant=args.batch_invariant,
            tuned_table=args.tuned_table,
        ),
    )


def _from_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes, activation, bias and dtype as the files have them."""
    facts = model_facts(checkpoint)
    layer = moe_layers(checkpoint, facts)[0]
    if layer.format not in STORED_DTYPES:
        raise CheckpointError(
            f"{checkpoint.folder}: the experts are stored as {layer.format}; "
            "only unquantized ones can be explained from a checkpoint"
        )
    parts, leaves = set(), set()
    for name in checkpoint.tensors:
        role = None if facts.family is None else facts.family.classify(name)
        if role is not None and role.part in EXPERT_PARTS:
            parts.add(role.part)
            leaves.add(role.leaf)
    known: dict[str, Any] = {name: getattr(facts.sizes, name) for name in SIZES}
    known |= {"dtype": STORED_DTYPES[layer.format], "bias": "bias" in leaves}
    if facts.family is not None and facts.family.interleaved:
        known["activation"] = MoEActivation.SWIGLUOAI
    elif facts.activation is not None:
        activation = MoEActivation.from_str(facts.activation)
        gated = facts.family is None or bool(parts & {"gate", "gate_up"})
        known["activation"] = activation if gated else activation.without_mul()
    return known


def _described(config: FusedMoEConfig) -> dict[str, Any]:
    return {
        "experts": config.num_experts,
        "top-k": config.experts_per_token,
        "hidden": config.hidden_dim,
        "intermediate": config.intermediate_size_per_partition,
        "activation": config.activation,
        "dtype": config.in_dtype,
        "device": config.device,
        "bias": config.has_bias,
    }


def _text(value: Any) -> str:
    return value.value if isinstance(value, MoEActivation) else str(value).removeprefix("torch.")
