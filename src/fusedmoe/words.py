"""Names of dtypes and devices, as people write them and machines have them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def dtype_named(name: str) -> torch.dtype | None:
    """The dtype called ``name``; None for "auto". ValueError for others."""
    if name == "auto":
        return None
    if name not in _DTYPES:
        raise ValueError(f"unsupported dtype {name!r}; choose auto, fp32, fp16 or bf16")
    return _DTYPES[name]


def device_named(name: str | torch.device | None) -> torch.device:
    """The device called ``name``, if it is there; without a name, the GPU or else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; for example cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unsupported device {str(name)!r}; fusedmoe runs on cpu and cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device {str(name)!r} is not there: torch sees {count} CUDA devices")
    return device


def device_name(device: torch.device) -> str:
    """What the machine calls its processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
