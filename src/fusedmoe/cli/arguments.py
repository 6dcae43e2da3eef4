"""Words of the command line turned into torch's objects."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fusedmoe.modular_kernel import FusedMoEExperts

SIZES = ("num_experts", "top_k", "hidden_size", "intermediate_size")


class LayerSizes(NamedTuple):
    """E experts, K of them per token, H hidden, I intermediate of one expert."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options for the sizes of a layer."""
    parser.add_argument("--num-experts", type=int, metavar="E")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--hidden-size", type=int, metavar="H")
    parser.add_argument("--intermediate-size", type=int, metavar="I", help="of one expert")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), fp32, fp16, bf16")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; cuda where there is one")


def as_options(names: Iterable[str]) -> str:
    """What arguments are called on the command line: "--top-k, --tokens"."""
    return ", ".join(
        name if name == "checkpoint" else "--" + name.replace("_", "-") for name in names
    )


def sizes_of(known: Mapping[str, int | None]) -> LayerSizes:
    """The four sizes out of ``known``; ValueError names the options that are missing."""
    missing = [name for name in SIZES if known.get(name) is None]
    if missing:
        raise ValueError(f"the layer's sizes are not complete: give {as_options(missing)}")
    return LayerSizes(**{name: known[name] for name in SIZES})  # type: ignore[arg-type]


def refuse_unused(args: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """ValueError for options among ``names`` that were given and that nothing reads ``where``."""
    given = [name for name in names if getattr(args, name) != args.default_of(name)]
    if given:
        raise ValueError(f"{as_options(given)} would have no effect {where}")


def experts_of(name: str | None) -> str | type | None:
    """An implementation by name, or by ``module:Class`` from anywhere Python finds it."""
    if name is None or ":" not in name:
        return name
    module_name, _, class_name = name.partition(":")
    # The ``fusedmoe`` script, unlike ``python -m``, does not look in the current folder.
    if "" not in sys.path:
        sys.path.insert(0, "")
    found = getattr(importlib.import_module(module_name), class_name, None)
    if not isinstance(found, type) or not issubclass(found, FusedMoEExperts):
        raise ValueError(f"{name!r} is not an experts class (a FusedMoEExpertsModular, say)")
    return found
