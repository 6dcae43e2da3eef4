"""What the smaller benchmarks share: variants in turns, a report with the machine's ceilings."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusedmoe.bench import BenchReport
from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.replays import record, time_in_turns
from fusedmoe.bench.report import Percentiles, make_header
from fusedmoe.bench.timing import Call, time_on_cpu

Times = dict[str, Percentiles]


def new_report(device: torch.device) -> BenchReport:
    return BenchReport(make_header(device, measure_ceilings(device, (torch.bfloat16,))))


@torch.inference_mode()
def timed(
    variants: Mapping[str, Sequence[Call]], expected_us: float, repeats: int, device: torch.device
) -> Times:
    """Median, p10 and p90 microseconds of each variant: graph replays in turns on a GPU."""
    if device.type == "cuda":
        found = {name: record(calls, expected_us, repeats) for name, calls in variants.items()}
        samples = time_in_turns(found)
        del found
        gc.collect()
        torch.cuda.empty_cache()
    else:
        samples = time_on_cpu(variants, repeats)
    return {name: Percentiles.of(taken) for name, taken in samples.items()}


def columns(times: Percentiles) -> dict[str, Any]:
    return {
        "us": round(times.us, 2),
        "p10_us": round(times.p10_us, 2),
        "p90_us": round(times.p90_us, 2),
    }
