"""``fusedmoe explain``: which implementations run a layer, and why not the others."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.checkpoint import (
    Checkpoint,
    CheckpointError,
    read_checkpoint,
    read_quantization_config,
)
from fusedmoe.cli.arguments import SIZES, add_sizes, device_of, dtype_of, experts_of, sizes_of
from fusedmoe.cli.facts import model_facts
from fusedmoe.cli.layers import moe_layers
from fusedmoe.cli.output import print_json
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.quantization.dialects import LayerSchemes
from fusedmoe.quantization.dialects.methods import select_stored
from fusedmoe.weights.checkpoint_experts import CheckpointExperts
from fusedmoe.weights.families import EXPERT_PARTS, config_value

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

    checkpoint = None if args.checkpoint is None else read_checkpoint(args.checkpoint)
    config = layer_config(args, quantized_too=True)
    schemes = None if checkpoint is None else _schemes(checkpoint)
    selection = explain(config) if schemes is None else select_stored(schemes, config)
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


def _schemes(checkpoint: Checkpoint) -> LayerSchemes | None:
    """How the first layer of experts is stored; None: as floats."""
    if read_quantization_config(checkpoint.folder, checkpoint.config) is None:
        return None
    experts = CheckpointExperts.read(checkpoint)
    return experts.schemes(next(iter(experts.layers.values())))


def layer_config(args: argparse.Namespace, *, quantized_too: bool = False) -> FusedMoEConfig:
    """The layer that the arguments describe, those of a checkpoint under what is given.

    Without ``quantized_too``, CheckpointError for experts that are not stored as floats.
    """
    known: dict[str, Any] = {}
    if args.checkpoint is not None:
        known = _from_checkpoint(read_checkpoint(args.checkpoint), quantized_too)
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


def _from_checkpoint(checkpoint: Checkpoint, quantized_too: bool) -> dict[str, Any]:
    """Sizes, activation, bias and dtype as the files have them."""
    facts = model_facts(checkpoint)
    layer = moe_layers(checkpoint, facts)[0]
    if layer.format not in STORED_DTYPES and not (quantized_too and layer.dialect):
        what = f"{checkpoint.folder}: the experts are stored as {layer.format}"
        wanted = "of no known dialect" if quantized_too else "floats are wanted"
        raise CheckpointError(layer.problem or f"{what}; {wanted}")
    parts, leaves = set(), set()
    for name in checkpoint.tensors:
        role = None if facts.family is None else facts.family.classify(name)
        if role is not None and role.part in EXPERT_PARTS:
            parts.add(role.part)
            leaves.add(role.leaf)
    known: dict[str, Any] = {name: getattr(facts.sizes, name) for name in SIZES}
    known |= {"dtype": _dtype(checkpoint, layer.format), "bias": "bias" in leaves}
    if facts.family is not None and facts.family.interleaved:
        known["activation"] = MoEActivation.SWIGLUOAI
    elif facts.activation is not None:
        activation = MoEActivation.from_str(facts.activation)
        gated = facts.family is None or bool(parts & {"gate", "gate_up"})
        known["activation"] = activation if gated else activation.without_mul()
    return known


def _dtype(checkpoint: Checkpoint, stored: str) -> torch.dtype:
    """Of the rows: that of experts stored as floats, else what config.json says of the model."""
    named = config_value(checkpoint.config, ("dtype", "torch_dtype"))
    found = getattr(torch, named, None) if isinstance(named, str) else None
    default = found if isinstance(found, torch.dtype) else torch.bfloat16
    return STORED_DTYPES.get(stored, default)


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
