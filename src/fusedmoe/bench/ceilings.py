"""What this machine can do at best, measured in the same run as everything else.

``read_gbs`` (the better of two ways to read) and ``copy_gbs`` (bytes read plus bytes written) in
GB/s, ``<format>_tflops`` of a large dense product of normal numbers in TFLOP/s.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from fusedmoe.experts.cpu_gemm import linear_for
from fusedmoe.kernels.read_all import read_all
from fusedmoe.testing.tolerances import format_name
from fusedmoe.words import device_name

_ELEMENTS = {"cpu": 1 << 27, "cuda": 1 << 30}  # fp32: 512 MiB, 4 GiB
_MATMUL = {"cpu": 2048, "cuda": 8192}
_RUNS = 7
# What a healthy GPU reaches, by a word of its name: measurements on a slower one prove nothing.
LEAST_CEILINGS = {"H200": {"read_gbs": 4300.0, "bf16_tflops": 710.0}}
_ATTEMPTS = 3  # what ran on the card before may still be ending


def measure_ceilings(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Bandwidths, and the matmul rate of each dtype."""
    found = _bandwidths(device)
    n = _MATMUL[device.type]
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        products: list[Callable[[], object]] = [partial(torch.mm, a, b)]
        if device.type == "cpu":
            products.append(partial(linear_for(dtype), a, b, torch.empty_like(a)))
        seconds = min(median_seconds(product, device) for product in products)
        found[f"{format_name(dtype)}_tflops"] = 2 * n**3 / seconds / 1e12
    return found


def least_ceilings(device: torch.device) -> Mapping[str, float]:
    """The row of ``LEAST_CEILINGS`` for this machine; other machines have to meet none."""
    words = device_name(device).split()
    return next((least for name, least in LEAST_CEILINGS.items() if name in words), {})


def lower_than(least: Mapping[str, float], found: Mapping[str, float]) -> str | None:
    """Which of the ceilings found are lower than ``least``, in words; None where none is."""
    low = [key for key, value in least.items() if found.get(key, value) < value]
    words = (f"{key} is {found[key]:.0f}, at least {least[key]:.0f} is asked" for key in low)
    return ", ".join(words) or None


def sound_ceilings(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    least: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """``measure_ceilings``, the best of a few attempts where they are lower than ``least`` (None:
    ``least_ceilings``). Raises ValueError where they stay so."""
    least, best = least_ceilings(device) if least is None else least, dict[str, float]()
    for _ in range(_ATTEMPTS):
        found = measure_ceilings(device, dtypes)
        best = {name: max(value, best.get(name, 0.0)) for name, value in found.items()}
        if lower_than(least, best) is None:
            return best
    raise ValueError(f"thrown away, this machine is slow: {lower_than(least, best)}")


def _bandwidths(device: torch.device) -> dict[str, float]:
    source = torch.ones(_ELEMENTS[device.type], device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    reads: list[Callable[[], object]] = [source.sum]
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        reads.append(partial(read_all, source))
    read = min(median_seconds(one, device) for one in reads)
    copy = median_seconds(partial(target.copy_, source), device)
    return {"read_gbs": size / read / 1e9, "copy_gbs": 2 * size / copy / 1e9}


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a few runs after one that warms up."""
    run()
    samples = []
    for _ in range(_RUNS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            samples.append(time.perf_counter() - begin)
    return statistics.median(samples)
