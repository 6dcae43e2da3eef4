"""What this machine can do at best, measured in the same run as everything else.

``read_gbs`` (the better of two ways to read) and ``copy_gbs`` (bytes read plus bytes written) in
GB/s, ``<format>_tflops`` of a large dense product of normal numbers in TFLOP/s.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from fusedmoe.experts.cpu_gemm import linear_for
from fusedmoe.kernels.read_all import read_all
from fusedmoe.testing.tolerances import format_name

_ELEMENTS = {"cpu": 1 << 27, "cuda": 1 << 30}  # fp32: 512 MiB, 4 GiB
_MATMUL = {"cpu": 2048, "cuda": 8192}
_RUNS = 7


def measure_ceilings(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Bandwidths, and the matmul rate of each dtype."""
    found = _bandwidths(device)
    n = _MATMUL[device.type]
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        products: list[Callable[[], object]] = [partial(torch.mm, a, b)]
        if device.type == "cpu":
            products.append(partial(linear_for(dtype), a, b, torch.empty_like(a)))
        seconds = min(_seconds(product, device) for product in products)
        found[f"{format_name(dtype)}_tflops"] = 2 * n**3 / seconds / 1e12
    return found


def _bandwidths(device: torch.device) -> dict[str, float]:
    source = torch.ones(_ELEMENTS[device.type], device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    reads: list[Callable[[], object]] = [source.sum]
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        reads.append(partial(read_all, source))
    read = min(_seconds(one, device) for one in reads)
    copy = _seconds(partial(target.copy_, source), device)
    return {"read_gbs": size / read / 1e9, "copy_gbs": 2 * size / copy / 1e9}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
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
