"""Seats: where a model has experts that can be replaced by packed ones, and how large they are.

E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from fusedmoe.integrations.transformers.borrowed import gate_of_experts
from fusedmoe.integrations.transformers.families import Experts, Family, at, find_family
from fusedmoe.integrations.transformers.gates import Gate
from fusedmoe.weights.families import read_sizes


@dataclass(frozen=True, kw_only=True)
class ExpertsSeat:
    """Where a model has experts, and what they are: found while it has no storage yet.

    ``path`` leads to the module; sizes are those of its parameters. ``whole``: its block does more
    than hand picks to it, and has to be run as a whole. ``unused`` experts behind the last have
    tensors and do nothing (zero experts).
    """

    path: str
    module: nn.Module
    gate: Gate
    top_k: int
    E: int
    H: int
    I: int  # noqa: E741
    has_bias: bool
    whole: bool = False
    unused: int = 0


def find_seats(model: nn.Module) -> list[ExpertsSeat]:
    """Every experts module of a model of a known family, which may be on the meta device.

    Raises ValueError for blocks whose experts cannot be run packed, naming why.
    """
    seats = []
    for path, block in model.named_modules():
        family = find_family(block)
        if family is None:
            continue
        if isinstance(family, str):
            raise ValueError(f"{path}: {family}")
        name = f"{path}.{family.experts.at}".strip(".")
        seats.append(seat_of(name, block, family, getattr(model, "config", None)))
    return seats


def seat_of(path: str, block: nn.Module, family: Family, config: Any) -> ExpertsSeat:
    """The seat of one block. Raises ValueError where its experts cannot be run packed."""
    part, module = family.experts, at(block, family.experts.at)
    if part.layout not in ("stacked", "transposed") or not isinstance(part.w13, str):
        raise ValueError(f"{path}: experts laid out as {part.layout!r} cannot be replaced")
    whole = (
        family.weights_on_input
        or "num_zero_experts" in family.router.rule
        or len(_arguments_of(module)) < 3
    )
    if whole and (module is block or not family.whole):
        raise ValueError(f"{path}: {family.name} does more than apply experts in its own module")
    E, H, I = sizes_of(part, module)  # noqa: E741
    top_k = (
        family.router.spec(block).top_k
        if family.router.rule
        else getattr(at(block, family.router.at), "top_k", None) or read_sizes(config).top_k or 1
    )
    return ExpertsSeat(
        path=path,
        module=module,
        gate=gate_of_experts(part, module),
        top_k=int(top_k),
        E=E,
        H=H,
        I=I,
        has_bias=at(module, part.w13_bias) is not None,
        whole=whole,
        unused=at(module, part.w13).shape[0] - E,
    )


def _arguments_of(module: nn.Module) -> list[str]:
    """The arguments of its forward: rows, ids and weights, or fewer where the module routes."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def sizes_of(part: Experts, module: nn.Module) -> tuple[int, int, int]:
    """(E, H, I) of an experts module, from the shape of its down projection."""
    E, *rest = at(module, part.w2).shape
    H, I = reversed(rest) if part.layout == "transposed" else rest  # noqa: E741
    return E, H, I
