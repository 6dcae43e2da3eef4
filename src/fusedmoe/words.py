"""Names of dtypes and devices, as people write them and machines have them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What rows, and scales that are no codes, may be in."""
DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
STORED_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""By their names in safetensors, which are those of GGUF where that has them."""
STORED_FLOATS = ("F32", "F16", "BF16", "F64")


def dtype_named(name: str) -> torch.dtype | None:
    """The one of ``FLOATS`` called ``name``, such as bf16 or bfloat16; None for "auto".

    ValueError for others.
    """
    for dtype in FLOATS:
        if name in (DTYPE_NAMES[dtype], str(dtype).removeprefix("torch.")):
            return dtype
    if name != "auto":
        raise ValueError(f"unsupported dtype {name!r}; choose auto, fp32, fp16 or bf16")
    return None


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
