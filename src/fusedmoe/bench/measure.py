"""One cell measured: who takes part, samples in turns, and what they show as rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fusedmoe.bench.contestants import Contestant, Prepared
from fusedmoe.bench.problems import Problem, Weights
from fusedmoe.bench.replays import Replays, launched, record, time_in_turns
from fusedmoe.bench.report import BenchReport, BenchRow, Percentiles, limit_us
from fusedmoe.bench.timing import Call, time_on_cpu
from fusedmoe.experts.copies import host_memory
from fusedmoe.testing.tolerances import format_name

MEMORY_SHARE = 0.6
"""Of what is free: what a run may take."""

# A pause after each sample, in lengths of the sample. Without one, products reach the card's power
# limit after a while, but would be compared with a rate that was measured in a short burst.
REST = 1.0
_LAUNCHED_REPEATS = 5
_COMPUTE_BOUND_MEAN = 64  # picks per active expert


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    ``repeats``: samples per implementation (None: 20 on a CPU, 50 on a GPU). A peer that needs more
    than ``peer_bytes`` of scratch memory is left out: it would take seconds per call.
    """

    repeats: int | None = None
    peer_bytes: int | None = None


def measure(
    problem: Problem,
    weights: list[Weights],
    contestants: list[Contestant],
    effort: Effort,
    report: BenchReport,
) -> None:
    """Time the contestants in turns, and hold their results against the definition.

    Adds a row for each to ``report``, or a note that says why it has none.
    """
    running: dict[str, tuple[Contestant, list[Prepared]]] = {}
    for one in contestants:
        if (reason := _does_not_fit(one, problem, effort)) is not None:
            report.notes.append(f"{problem.cell}: {one.name} left out: {reason}")
            continue
        try:
            prepared = [
                one.prepare(i % len(weights), problem.x, situation)
                for i, situation in enumerate(problem.situations)
            ]
        except Exception as error:
            report.notes.append(f"{problem.cell}: {one.name} left out: {in_words(error)}")
            continue
        running[one.name] = one, prepared
    run = _run_on_cuda if problem.x.is_cuda else _run_on_cpu
    for name, (samples, output, timed) in run(problem, running, effort, report).items():
        one, prepared = running[name]
        deviation = None
        if one.scope != "dense":
            deviation = problem.error(weights[0], prepared[0].finish(output))
            if not math.isfinite(deviation):
                report.notes.append(f"{problem.cell}: {name} left out: its output is not finite")
                continue
        report.add(_row(problem, one, samples, timed, deviation, report))


Measured = dict[str, tuple[list[float], torch.Tensor, str]]
"""By name: samples in microseconds, the first situation's result, and how it was timed."""


def _run_on_cpu(
    problem: Problem,
    running: dict[str, tuple[Contestant, list[Prepared]]],
    effort: Effort,
    report: BenchReport,
) -> Measured:
    calls: dict[str, list[Call]] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, (_, prepared) in running.items():
        try:
            outputs[name] = prepared[0].call()
        except Exception as error:
            report.notes.append(f"{problem.cell}: {name} left out: {in_words(error)}")
            continue
        calls[name] = [one.call for one in prepared]
    samples = time_on_cpu(calls, effort.repeats or 20)
    return {name: (taken, outputs[name], "launches") for name, taken in samples.items()}


def _run_on_cuda(
    problem: Problem,
    running: dict[str, tuple[Contestant, list[Prepared]]],
    effort: Effort,
    report: BenchReport,
) -> Measured:
    expected_us = _limit_us(problem, report)
    repeats = effort.repeats or 50
    recorded: dict[str, Replays] = {}
    for name, (one, prepared) in running.items():
        calls = [each.call for each in prepared]
        if not one.in_graph:
            recorded[name] = launched(calls, min(repeats, _LAUNCHED_REPEATS))
            continue
        try:
            replays = record(calls, expected_us, repeats)
            recorded[name] = replays if one.is_peer else replace(replays, at_least=repeats)
        except Exception as error:
            why = in_words(error)
            report.notes.append(f"{problem.cell}: {name} left out, not captured: {why}")
            torch.cuda.synchronize()
    samples = time_in_turns(recorded, REST if _is_compute_bound(problem) else 0.0)
    return {
        name: (
            samples[name],
            one.graphs[0]().clone(),
            "graph" if running[name][0].in_graph else "launches",
        )
        for name, one in recorded.items()
    }


def _is_compute_bound(problem: Problem) -> bool:
    """Whether tensor units, and so the power that they draw, decide about the time."""
    return problem.pairs > _COMPUTE_BOUND_MEAN * problem.active_experts


def in_words(error: Exception) -> str:
    """The first line of what went wrong, for a note; its type where that says what the text leaves
    open."""
    first = (str(error).splitlines() or [""])[0][:400]
    told = isinstance(error, (ValueError, RuntimeError)) and first
    return first if told else f"{type(error).__name__}: {first}".removesuffix(": ")


def _does_not_fit(contestant: Contestant, problem: Problem, effort: Effort) -> str | None:
    needed = contestant.scratch_bytes(problem.cell.T)
    if needed is None:
        return None
    if contestant.is_peer and effort.peer_bytes is not None and needed > effort.peer_bytes:
        return (
            f"needs {needed / 2**30:.1f} GiB of scratch memory, more than the "
            f"{effort.peer_bytes / 2**30:.1f} that a peer is given"
        )
    free = free_memory(problem.x.device)
    if free is None or needed <= free * MEMORY_SHARE:
        return None
    return f"needs {needed / 2**30:.1f} GiB of scratch memory, {free / 2**30:.1f} are free"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = host_memory()
    return None if memory is None else memory.available


def _limit_us(problem: Problem, report: BenchReport, weight_bytes: int | None = None) -> float:
    ceilings, key = report.header, format_name(problem.cell.dtype)
    return limit_us(problem, ceilings["read_gbs"], ceilings[f"{key}_tflops"], weight_bytes)


def _row(
    problem: Problem,
    contestant: Contestant,
    samples: list[float],
    timed: str,
    error: float | None,
    report: BenchReport,
) -> BenchRow:
    cell, shape, key = problem.cell, problem.cell.shape, format_name(problem.cell.dtype)
    taken = Percentiles.of(samples)
    flops, limit = problem.flops, _limit_us(problem, report, contestant.weight_bytes)
    if contestant.flops is not None:
        flops = contestant.flops
        limit = flops / report.header[f"{key}_tflops"] / 1e6
    return BenchRow(
        impl=contestant.name,
        **shape.columns,
        T=cell.T,
        format=contestant.format or key,
        routing=cell.routing,
        active_experts=problem.active_experts,
        pairs=problem.pairs,
        scope=contestant.scope,
        timed=timed,
        **taken.rounded(),
        limit_us=round(limit, 2),
        fraction_of_limit=round(limit / taken.us, 4),
        tflops=round(flops / taken.us / 1e6, 4),
        error=None if error is None else float(f"{error:.3g}"),
        runs=len(samples),
        workspace_bytes=None if contestant.is_peer else contestant.scratch_bytes(cell.T),
    )
