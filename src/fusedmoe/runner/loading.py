"""Checkpoint tensors of a whole layer: to its own parts by name, the rest to the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusedmoe.weights.loadable import NamedTensors, named_tensors, own_name

if TYPE_CHECKING:
    from fusedmoe.runner.moe_runner import MoERunner


def load_into_parts(runner: MoERunner, weights: NamedTensors) -> set[str]:
    """As ``MoERunner.load_weights``."""
    runner.routed_experts.loading_begins()
    with runner.routed_experts.unusable_on_error():
        written = _load(runner, weights)
    runner.routed_experts.loading_done()
    return written


def _load(runner: MoERunner, weights: NamedTensors) -> set[str]:
    parts = {
        name: dict(part.named_parameters()) | dict(part.named_buffers())
        for name, part in runner.named_children()
        if name not in ("routed_experts", "router")
    }
    written: set[str] = set()
    for full_name, tensor in named_tensors(weights):
        name = own_name(full_name, runner.prefix)
        part, _, rest = name.partition(".")
        if part not in parts:
            written |= {
                f"routed_experts.{n}" for n in runner.routed_experts.load_tensor(full_name, tensor)
            }
            continue
        target = parts[part].get(rest)
        if target is None:
            raise ValueError(f"{name}: {part} has no parameter {rest}, only {sorted(parts[part])}")
        if target.shape != tensor.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(target.shape)}, found {tuple(tensor.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensor)
        written.add(name)
    return written
