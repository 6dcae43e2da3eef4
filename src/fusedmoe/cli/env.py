"""``fusedmoe env``: versions, devices, and which implementations this machine can run."""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import replace
from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.cli.output import format_bytes, print_json, print_table
from fusedmoe.config import FusedMoEConfig
from fusedmoe.modular_kernel import FusedMoEExperts
from fusedmoe.quantization.keys import GroupShape, QuantKey
from fusedmoe.words import device_name, package_version

PACKAGES = (
    "fusedmoe",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "numpy",
    "tqdm",
    "matplotlib",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace) -> int:
    record: dict[str, Any] = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "devices": devices(),
    }
    if args.json:
        print_json(record)
        return 0
    print(f"Python {record['python']} on {record['platform']}")
    print(f"CUDA of torch: {record['cuda'] or 'none (a CPU build)'}\n")
    print_table(
        ["package", "version"],
        [[name, found or "not installed"] for name, found in record["packages"].items()],
    )
    for device in record["devices"]:
        print(f"\n{device['device']}: {device['name']}")
        print_table(
            ["experts", "available"],
            [[name, why or "yes"] for name, why in device["experts"].items()],
        )
    return 0


def devices() -> list[dict[str, Any]]:
    """Each device with its name, memory and, per experts implementation, why not (None: it can)."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads",
            "capability": None,
            "memory_bytes": None,
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": f"{properties.name}, compute capability "
                f"{properties.major}.{properties.minor}, "
                f"{format_bytes(properties.total_memory)}",
                "capability": [properties.major, properties.minor],
                "memory_bytes": properties.total_memory,
            }
        )
    for device in found:
        device["experts"] = available_experts(torch.device(device["device"]))
    return found


def available_experts(device: torch.device) -> dict[str, str | None]:
    """Name -> why it does not run a plain bf16 layer there (None: it does).

    In whatever weight format it knows, unquantized where that is one of them.
    """
    from fusedmoe.selection import EXPERTS, candidate_classes, name_of

    plain = FusedMoEConfig(
        num_experts=8,
        num_local_experts=8,
        experts_per_token=2,
        hidden_dim=256,
        intermediate_size_per_partition=256,
        activation=MoEActivation.SILU,
        in_dtype=torch.bfloat16,
        device=device,
    )
    return {name_of(cls): _unmet(cls, plain) for cls in candidate_classes(EXPERTS)}


def _unmet(cls: type[FusedMoEExperts], plain: FusedMoEConfig) -> str | None:
    known = cls.capabilities().weight_formats
    weights, rows = (None, None) if (None, None) in known else min(known, key=str)
    keys = _of_some_size(weights), _of_some_size(rows)
    return cls.is_supported_config(plain, *keys, cls.activation_format())[1]


def _of_some_size(key: QuantKey | None) -> QuantKey | None:
    """``key`` with 128 where it stands for every number of rows or columns."""
    if key is None:
        return None
    return replace(key, group_shape=GroupShape(*(size or 128 for size in key.group_shape)))
