"""``fusedmoe explain``: which implementations run a layer, and why not the others."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.checkpoint import Checkpoint, read_checkpoint, read_quantization_config
from fusedmoe.cli.arguments import add_device, add_dtype, experts_of
from fusedmoe.cli.layer_config import add_layer_arguments, layer_config
from fusedmoe.cli.output import print_json
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.integrations.transformers.gguf import GgufSource, gguf_of
from fusedmoe.quantization.dialects import LayerSchemes
from fusedmoe.quantization.dialects.online import OnlineQuantization
from fusedmoe.quantization.quantized import QuantizedFusedMoEMethod
from fusedmoe.weights.checkpoint_experts import CheckpointExperts
from fusedmoe.weights.routed_experts import RoutedExperts
from fusedmoe.words import dtype_named

if TYPE_CHECKING:
    from fusedmoe.selection import Selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="a folder or GGUF file; or give the sizes")
    add_layer_arguments(parser)
    add_dtype(parser)
    add_device(parser)
    parser.add_argument(
        "--experts", metavar="NAME", help="force an implementation, by name or module:Class"
    )
    parser.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="as if experts stored as floats were rounded: fp8, int8, int4_g128, mxfp4, ...",
    )
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--tuned-table", metavar="FILE", help="tiles that fusedmoe tune measured")


def run(args: argparse.Namespace) -> int:
    from fusedmoe.selection import explain, name_of
    from fusedmoe.tuning.choice import source_of_tiles
    from fusedmoe.tuning.tuned_kernels import KERNELS

    checkpoint = None if args.checkpoint is None else _read(Path(args.checkpoint))
    options = MoEOptions(
        experts=experts_of(args.experts),
        batch_invariant=args.batch_invariant,
        tuned_table=args.tuned_table,
    )
    config = layer_config(args, checkpoint, dtype_named(args.dtype), options, quantized_too=True)
    schemes = None if checkpoint is None else _schemes(checkpoint)
    if args.quantize is not None:
        selection = _rounded(args.quantize, config, schemes)
    elif schemes is None:
        selection = explain(config)
    else:
        method = QuantizedFusedMoEMethod.of_stored(schemes, config)
        selection = method.select_on(config.device)
    kernel = KERNELS.get(selection.chosen.name)
    tiles = None if kernel is None else source_of_tiles(config, kernel)
    if args.json:
        layer = {
            name: value.value if isinstance(value, MoEActivation) else str(value)
            for name, value in _described(config).items()
        }
        print_json(
            {
                "layer": layer,
                "experts": name_of(selection.chosen),
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


def _read(path: Path) -> Checkpoint | GgufSource:
    gguf = gguf_of(path)
    return read_checkpoint(path) if gguf is None else GgufSource(gguf)


def _schemes(checkpoint: Checkpoint | GgufSource) -> LayerSchemes | None:
    """How the first layer of experts is stored; None: as floats."""
    if isinstance(checkpoint, GgufSource):
        return checkpoint.schemes(next(iter(checkpoint.layers.values())))
    if read_quantization_config(checkpoint.folder, checkpoint.config) is None:
        return None
    experts = CheckpointExperts.read(checkpoint)
    return experts.schemes(next(iter(experts.layers.values())))


def _rounded(name: str, config: FusedMoEConfig, stored: LayerSchemes | None) -> Selection:
    """What runs the layer in the format ``name``; ValueError where its experts cannot have it."""
    if stored is not None:
        raise ValueError(f"--quantize rounds floats, and these experts are {stored.name} already")
    method = QuantizedFusedMoEMethod(config, OnlineQuantization.of(name).format)
    with torch.device("meta"):
        RoutedExperts(replace(config, device=torch.device("meta")), method)  # do its groups fit
    return method.select_on(config.device)


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
