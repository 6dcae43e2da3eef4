"""A layer described on the command line: by sizes, by a checkpoint, or by both."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.checkpoint import CONFIG_NAME, Checkpoint, CheckpointError, read_checkpoint
from fusedmoe.cli.arguments import SIZES, add_sizes, sizes_of
from fusedmoe.cli.facts import ModelFacts, model_facts
from fusedmoe.cli.layers import moe_layers
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.integrations.transformers.gguf import GgufSource
from fusedmoe.weights.families import EXPERT_PARTS, CheckpointFamily, TensorRole, config_value
from fusedmoe.words import FLOATS, STORED_DTYPES, device_named

if TYPE_CHECKING:
    from fusedmoe.bench.shapes import LayerShape


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``layer_config`` reads, but for the checkpoint and the device."""
    add_sizes(parser)
    parser.add_argument("--activation", metavar="NAME", help="silu where nothing else is known")
    parser.add_argument("--bias", action="store_true", help="the experts have biases")


def shapes_asked(
    args: argparse.Namespace, default: str | None = None, *, quantized_too: bool = False
) -> tuple[list[LayerShape], torch.dtype]:
    """Layers to be measured: by name, by sizes, a checkpoint's; and the dtype of their rows.

    ``default``: the name where the arguments say nothing. ``quantized_too``: as ``layer_config``.
    """
    from fusedmoe.bench.shapes import LayerShape, named_shapes

    given = args.activation or args.bias or any(getattr(args, n) is not None for n in SIZES)
    if args.shapes and (given or args.checkpoint):
        raise ValueError("give --shapes, or sizes, or a checkpoint folder")
    if args.shapes or (default and not (given or args.checkpoint)):
        return named_shapes(args.shapes or [default]), torch.bfloat16
    checkpoint = None if args.checkpoint is None else read_checkpoint(args.checkpoint)
    config = layer_config(args, checkpoint, quantized_too=quantized_too)
    if not (quantized_too or config.activation.is_gated):
        raise ValueError(f"{config.activation.value}: only experts with a gate are tuned")
    shape = LayerShape(
        "custom" if checkpoint is None else checkpoint.folder.resolve().name,
        config.num_experts,
        config.experts_per_token,
        config.hidden_dim,
        config.intermediate_size_per_partition,
        activation=config.activation.value,
        bias=config.has_bias,
    )
    return [shape], config.in_dtype


def layer_config(
    args: argparse.Namespace,
    checkpoint: Checkpoint | GgufSource | None,
    dtype: torch.dtype | None = None,
    options: MoEOptions | None = None,
    *,
    quantized_too: bool = False,
) -> FusedMoEConfig:
    """The layer of ``checkpoint``, in which arguments that are given override what it says.

    ``dtype`` None: the checkpoint's. Without ``quantized_too``, CheckpointError for experts that
    are not stored as floats.
    """
    known: dict[str, Any] = {}
    if isinstance(checkpoint, GgufSource):
        known = checkpoint.layer_facts()
    elif checkpoint is not None:
        facts = model_facts(checkpoint)
        roles = _expert_roles(checkpoint, facts.family)
        known = _from_checkpoint(checkpoint, facts, roles, quantized_too)
        if args.activation is None:
            known["activation"] = _activation_of(checkpoint, facts, roles)
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
        in_dtype=dtype or known.get("dtype", torch.bfloat16),
        device=device_named(args.device),
        has_bias=args.bias or known.get("bias", False),
        options=options or MoEOptions(),
    )


def note_on_format(folder: str) -> str | None:
    """A note for experts of a checkpoint that are measured in another format than their own."""
    checkpoint = read_checkpoint(folder)
    stored = moe_layers(checkpoint, model_facts(checkpoint))[0].format
    if _floats(stored):
        return None
    return f"{checkpoint.folder} stores experts as {stored}; floats of their shape were measured"


def _from_checkpoint(
    checkpoint: Checkpoint, facts: ModelFacts, roles: list[TensorRole], quantized_too: bool
) -> dict[str, Any]:
    """Sizes, bias and dtype as the files have them."""
    layer = moe_layers(checkpoint, facts)[0]
    if not _floats(layer.format) and not (quantized_too and layer.dialect):
        what = f"{checkpoint.folder}: the experts are stored as {layer.format}"
        wanted = "of no known dialect" if quantized_too else "floats are wanted"
        raise CheckpointError(layer.problem or f"{what}; {wanted}")
    known: dict[str, Any] = {name: getattr(facts.sizes, name) for name in SIZES}
    has_bias = any(role.leaf == "bias" for role in roles)
    return known | {"dtype": _dtype(checkpoint, layer.format), "bias": has_bias}


def _activation_of(
    checkpoint: Checkpoint, facts: ModelFacts, roles: list[TensorRole]
) -> MoEActivation | None:
    """What config.json and the experts' tensors say; CheckpointError for a name that is not known.

    None where nothing is said.
    """
    if facts.family is not None and facts.family.interleaved:
        return MoEActivation.SWIGLUOAI
    if facts.activation is None:
        return None
    try:
        activation = MoEActivation.from_str(facts.activation)
    except ValueError as error:
        where = checkpoint.folder / CONFIG_NAME
        instead = "--activation takes one of these instead"
        raise CheckpointError(f"{where}: {error}; {instead}") from None
    gated = facts.family is None or any(role.part in ("gate", "gate_up") for role in roles)
    return activation if gated else activation.without_mul()


def _expert_roles(checkpoint: Checkpoint, family: CheckpointFamily | None) -> list[TensorRole]:
    """What those tensors are that belong to experts, in a family of the table."""
    if family is None:
        return []
    roles = (family.classify(name) for name in checkpoint.tensors)
    return [role for role in roles if role is not None and role.part in EXPERT_PARTS]


def _dtype(checkpoint: Checkpoint, stored: str) -> torch.dtype:
    """The rows' dtype: that of experts stored as floats, else the model's in config.json."""
    named = config_value(checkpoint.config, ("dtype", "torch_dtype"))
    found = getattr(torch, named, None) if isinstance(named, str) else None
    default = found if isinstance(found, torch.dtype) else torch.bfloat16
    return _floats(stored) or default


def _floats(stored: str) -> torch.dtype | None:
    """The dtype of experts stored as "f32", "f16" or "bf16"; None where they are not."""
    dtype = STORED_DTYPES.get(stored.upper())
    return dtype if dtype in FLOATS else None
