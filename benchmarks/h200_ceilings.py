"""Ceilings of an H200 that is well: a run on a slower one proves nothing and is thrown away."""

from __future__ import annotations

import torch

from fusedmoe.bench.ceilings import LEAST_CEILINGS, sound_ceilings

LEAST_READ_GBS = LEAST_CEILINGS["H200"]["read_gbs"]
LEAST_BF16_TFLOPS = LEAST_CEILINGS["H200"]["bf16_tflops"]


def ceilings_of(device: torch.device) -> dict[str, float]:
    """The ceilings of any machine; SystemExit for an H200 that is slow."""
    return _or_exit(device)


def h200_ceilings(
    device: torch.device,
    least_read: float = LEAST_READ_GBS,
    least_rate: float = LEAST_BF16_TFLOPS,
) -> dict[str, float]:
    """The best of each ceiling in a few attempts. SystemExit where they stay low."""
    return _or_exit(device, {"read_gbs": least_read, "bf16_tflops": least_rate})


def _or_exit(device: torch.device, least: dict[str, float] | None = None) -> dict[str, float]:
    try:
        return sound_ceilings(device, (torch.bfloat16,), least)
    except ValueError as error:
        raise SystemExit(str(error)) from None
