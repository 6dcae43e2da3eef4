"""Ceilings of an H200 that is well: a run on a slower one proves nothing and is thrown away."""

from __future__ import annotations

import torch

from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.words import device_name

LEAST_READ_GBS, LEAST_BF16_TFLOPS = 4300.0, 710.0
ATTEMPTS = 3  # what ran on the card before may still be ending


def ceilings_of(device: torch.device) -> dict[str, float]:
    """The ceilings of any machine; SystemExit for an H200 that is slow."""
    if "H200" in device_name(device).split():
        return h200_ceilings(device)
    return measure_ceilings(device, (torch.bfloat16,))


def h200_ceilings(
    device: torch.device,
    least_read: float = LEAST_READ_GBS,
    least_rate: float = LEAST_BF16_TFLOPS,
) -> dict[str, float]:
    """The best of each ceiling in a few attempts. SystemExit where they stay low."""
    best: dict[str, float] = {}
    for _ in range(ATTEMPTS):
        found = measure_ceilings(device, (torch.bfloat16,))
        best = {name: max(value, best.get(name, 0.0)) for name, value in found.items()}
        if best["read_gbs"] >= least_read and best["bf16_tflops"] >= least_rate:
            return best
    raise SystemExit(
        f"thrown away: this GPU reads {best['read_gbs']:.0f} GB/s and multiplies at "
        f"{best['bf16_tflops']:.0f} TFLOP/s, at least {least_read:.0f} and {least_rate:.0f} are "
        "asked"
    )
