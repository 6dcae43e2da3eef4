"""What the smaller benchmarks share: variants in turns, a report with the machine's ceilings."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from h200_ceilings import ceilings_of

from fusedmoe.bench import BenchReport
from fusedmoe.bench.replays import record, time_in_turns
from fusedmoe.bench.report import Percentiles, make_header
from fusedmoe.bench.timing import Call, time_on_cpu

Times = dict[str, Percentiles]


def new_report(device: torch.device) -> BenchReport:
    """Empty; SystemExit where the device is an H200 that is slower than one should be."""
    return BenchReport(make_header(device, ceilings_of(device)))


@torch.inference_mode()
def timed(
    variants: Mapping[str, Sequence[Call]],
    expected_us: float,
    repeats: int,
    device: torch.device,
    rest: float = 0.0,
) -> Times:
    """Median, p10 and p90 microseconds of each variant: graph replays in turns on a GPU, which
    rests after each, ``rest`` times as long as it took."""
    if device.type == "cuda":
        found = {
            name: replace(record(calls, expected_us, repeats), at_least=repeats)
            for name, calls in variants.items()
        }
        samples = time_in_turns(found, rest)
        del found
        gc.collect()
        torch.cuda.empty_cache()
    else:
        samples = time_on_cpu(variants, repeats)
    return {name: Percentiles.of(taken) for name, taken in samples.items()}


def columns(times: Percentiles, limit_us: float, flops: float, error: float) -> dict[str, Any]:
    """What every row has: how long, what the machine allows, and how exact."""
    return {
        **times.rounded(),
        "limit_us": round(limit_us, 2),
        "fraction_of_limit": round(limit_us / times.us, 4),
        "tflops": round(flops / times.us / 1e6, 4),
        "error": float(f"{error:.3g}"),
    }
