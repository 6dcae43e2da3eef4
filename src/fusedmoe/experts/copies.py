"""Copies of weights made for speed: whether there is room for them, and whether they still hold.

They cost memory, not accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

_MEMINFO = Path("/proc/meminfo")
# Limit and usage of the container, in the second and the first version of Linux' control groups.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


class Memory(NamedTuple):
    """Bytes, of the machine or of the container that this process is confined to."""

    total: int
    available: int


RESERVED_SHARE = 0.25
"""Of the memory: what copies made for speed leave free."""


def room_for(size: int) -> bool:
    """Whether a copy of ``size`` bytes leaves enough free; False where this system does not say."""
    memory = host_memory()
    return memory is not None and memory.available - size >= RESERVED_SHARE * memory.total


def host_memory() -> Memory | None:
    """What there is and what is free; None where this system does not say."""
    try:
        words = {line.split(":")[0]: line.split()[1] for line in _MEMINFO.read_text().splitlines()}
        total, available = (int(words[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, IndexError, ValueError):
        return None
    for limit_file, usage_file in _CGROUPS:
        try:
            limit, usage = int(limit_file.read_text()), int(usage_file.read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        total, available = min(total, limit), min(available, limit - usage)
    return Memory(total, max(0, available))


class Source(NamedTuple):
    """Which values were copied: where they lie, and how often they had been written to."""

    address: int
    version: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Source:
        return cls(weight.data_ptr(), -1 if weight.is_inference() else weight._version)
