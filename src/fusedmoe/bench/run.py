"""Measuring cells: a table of shapes x dtypes x token counts x routings, or any list of cells."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.contestants import (
    DEFAULT_PEERS,
    Contestant,
    Prepared,
    contestant_name,
    our_layer,
    peer,
)
from fusedmoe.bench.problems import SCOPES, Cell, Problem, Scope, Weights, random_weights
from fusedmoe.bench.replays import Replays, launched, record, time_in_turns
from fusedmoe.bench.report import BenchReport, BenchRow, Percentiles, limit_us, make_header
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.bench.timing import time_on_cpu
from fusedmoe.config import MoEOptions
from fusedmoe.experts.cpu_memory import host_memory
from fusedmoe.testing.routing import routing_logits
from fusedmoe.testing.tolerances import format_name
from fusedmoe.tuning.tuned_table import TunedTable

Progress = Callable[[int, int, str], None]
"""Called before each problem: how many are done, of how many, and what comes next."""

_SITUATIONS_ON_CPU = 5
_COPIES_ON_CUDA = 4
_MEMORY_SHARE = 0.6
_LAUNCHED_REPEATS = 5
# A pause after each sample, in lengths of the sample. Without one, products sit at the card's power
# limit after a while, and would be held against a rate that was measured in a short burst.
REST = 1.0
_COMPUTE_BOUND_MEAN = 64  # picks per active expert


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    ``repeats``: samples per implementation (None: 20 on a CPU, 50 on a GPU). A peer that needs more
    than ``peer_bytes`` of scratch memory is left out: it would take seconds per call.
    """

    repeats: int | None = None
    peer_bytes: int | None = None


def count_measurements(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    routings: Sequence[str],
) -> int:
    """How many problems a run has (what progress counts)."""
    return len(shapes) * len(tokens) * len(dtypes) * len(routings)


def run_layer_bench(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    routings: Sequence[str] = ("uniform",),
    device: torch.device | str = "cpu",
    peers: bool | Sequence[str] = True,
    repeats: int | None = None,
    progress: Progress | None = None,
    *,
    experts: Sequence[str | type | None] = (None,),
    scope: Scope = "layer",
    tuned_table: TunedTable | None = None,
) -> BenchReport:
    """Time the layer from router logits to output on random data.

    ``experts``: implementations by name or class (None is what selection chooses); ``peers``:
    names of ``contestants.PEERS``, or True for Transformers' batched_mm, grouped_mm and (on a CPU)
    eager. ``repeats``: samples per implementation (default 20 on a CPU, 50 on a GPU). ``scope``
    "experts" begins at given picks. ``tuned_table``: tiles for this library's layer. On a GPU every
    sample replays a CUDA graph over several sets of weights; what cannot be captured or does not
    fit becomes a note.

    Raises ValueError for an empty list, unknown routing, scope, device or dtype.
    """
    device = torch.device(device)
    _check(shapes, tokens, dtypes, routings, device, scope)
    cells = [
        Cell(shape, dtype, routing, T, scope)
        for shape in shapes
        for dtype in dtypes
        for routing in routings
        for T in tokens
    ]
    if peers is True:
        peers = [name for name in DEFAULT_PEERS if device.type == "cpu" or "eager" not in name]
    names = tuple(peers or ())
    report = BenchReport(make_header(device, measure_ceilings(device, tuple(dtypes))))
    for done, cell in enumerate(
        run_cells(cells, report, device, experts, lambda cell: names, Effort(repeats), tuned_table)
    ):
        if progress is not None:
            progress(done, len(cells), str(cell))
    return report


def _check(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    routings: Sequence[str],
    device: torch.device,
    scope: str,
) -> None:
    if not (shapes and tokens and dtypes and routings):
        raise ValueError("a benchmark needs a shape, a token count, a dtype and a routing")
    if min(tokens) < 1:
        raise ValueError(f"token counts must be at least 1, got {min(tokens)}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"cannot measure on {device}; choose cpu or cuda")
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    for dtype in dtypes:
        format_name(dtype)
    for routing in routings:
        routing_logits(routing, 0, 1, 1)


def run_cells(
    cells: Iterable[Cell],
    report: BenchReport,
    device: torch.device,
    experts: Sequence[str | type | None] = (None,),
    peers: Callable[[Cell], Sequence[str]] = lambda cell: (),
    effort: Effort = Effort(),
    tuned_table: TunedTable | None = None,
) -> Iterator[Cell]:
    """Measure cells into ``report``, yielding each one before it begins.

    ``peers``: names of ``contestants.PEERS`` for each cell. Neighbours of the same shape and dtype
    share weights. ``report``'s header has the ceilings.
    """
    for (shape, dtype), group in groupby(cells, key=lambda cell: (cell.shape, cell.dtype)):
        torch.manual_seed(0)
        weights = random_weights(shape, dtype, device, _copies(shape, dtype, device))
        built: dict[tuple[str, Scope], Contestant | None] = {}
        for cell in group:
            yield cell
            with torch.inference_mode():
                builders = _builders(experts, peers(cell), tuned_table)
                contestants = _contestants(cell, weights, builders, built, report)
                situations = len(weights) if device.type == "cuda" else _SITUATIONS_ON_CPU
                problem = Problem.of(cell, situations, device)
                _measure(problem, weights, contestants, effort, report)
                del problem
            _free_unused(device)
        del weights, built
        _free_unused(device)


def _free_unused(device: torch.device) -> None:
    """Give memory back, that of the graphs too: what is free decides who can take part."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _copies(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> int:
    """Sets of weights: on a GPU several, as far as memory goes; on a CPU logits vary instead."""
    if device.type == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    one = shape.weight_elements * dtype.itemsize
    return max(1, min(_COPIES_ON_CUDA, int(free * _MEMORY_SHARE) // one))


def _builders(
    experts: Sequence[str | type | None], peers: Sequence[str], tuned_table: TunedTable | None
) -> Mapping[str, Callable[..., Contestant]]:
    ours = {
        contestant_name(one): partial(
            our_layer, experts=one, options=MoEOptions(experts=one, tuned_table=tuned_table)
        )
        for one in experts
    }
    return ours | {name: partial(peer, name) for name in peers}


def _contestants(
    cell: Cell,
    weights: list[Weights],
    builders: Mapping[str, Callable[..., Contestant]],
    built: dict[tuple[str, Scope], Contestant | None],
    report: BenchReport,
) -> list[Contestant]:
    """Those that can run this cell; each is built once for its weights and scope."""
    for name, build in builders.items():
        if (name, cell.scope) in built:
            continue
        try:
            built[name, cell.scope] = build(cell.shape, weights, scope=cell.scope)
        except ValueError as error:
            report.notes.append(f"{cell.shape.name}: {name} left out: {error}")
            built[name, cell.scope] = None
    found = [built[name, cell.scope] for name in builders]
    return [one for one in found if one is not None]


def _measure(
    problem: Problem,
    weights: list[Weights],
    contestants: list[Contestant],
    effort: Effort,
    report: BenchReport,
) -> None:
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
        except RuntimeError as error:
            report.notes.append(f"{problem.cell}: {one.name} left out: {_first_line(error)}")
            continue
        running[one.name] = one, prepared
    run = _run_on_cuda if problem.x.is_cuda else _run_on_cpu
    for name, (samples, output, timed) in run(problem, running, effort, report).items():
        one, prepared = running[name]
        deviation = None
        if one.scope != "dense":
            deviation = problem.error(weights[0], prepared[0].finish(output))
        report.add(_row(problem, one, samples, timed, deviation, report))


Measured = dict[str, tuple[list[float], torch.Tensor, str]]
"""By name: samples in microseconds, the first situation's result, and how it was timed."""


def _run_on_cpu(
    problem: Problem,
    running: dict[str, tuple[Contestant, list[Prepared]]],
    effort: Effort,
    report: BenchReport,
) -> Measured:
    calls = {name: [one.call for one in prepared] for name, (_, prepared) in running.items()}
    samples = time_on_cpu(calls, effort.repeats or 20)
    return {name: (taken, calls[name][0](), "launches") for name, taken in samples.items()}


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
            recorded[name] = record(calls, expected_us, repeats)
        except RuntimeError as error:  # also torch.cuda.OutOfMemoryError
            why = _first_line(error)
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _does_not_fit(contestant: Contestant, problem: Problem, effort: Effort) -> str | None:
    needed = contestant.scratch_bytes(problem.cell.T)
    if needed is None:
        return None
    if contestant.is_peer and effort.peer_bytes is not None and needed > effort.peer_bytes:
        return (
            f"needs {needed / 2**30:.1f} GiB of scratch memory, more than the "
            f"{effort.peer_bytes / 2**30:.1f} that a peer is given"
        )
    free = _free_memory(problem.x.device)
    if free is None or needed <= free * _MEMORY_SHARE:
        return None
    return f"needs {needed / 2**30:.1f} GiB of scratch memory, {free / 2**30:.1f} are free"


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = host_memory()
    return None if memory is None else memory.available


def _limit_us(problem: Problem, report: BenchReport) -> float:
    key = format_name(problem.cell.dtype)
    return limit_us(problem, report.header["read_gbs"], report.header[f"{key}_tflops"])


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
    flops, limit = problem.flops, _limit_us(problem, report)
    if contestant.flops is not None:
        flops = contestant.flops
        limit = flops / report.header[f"{key}_tflops"] / 1e6
    return BenchRow(
        impl=contestant.name,
        shape=shape.name,
        E=shape.E,
        num_experts=shape.num_experts,
        k=shape.k,
        H=shape.H,
        I=shape.I,
        T=cell.T,
        format=key,
        routing=cell.routing,
        active_experts=problem.active_experts,
        pairs=problem.pairs,
        scope=contestant.scope,
        timed=timed,
        us=round(taken.us, 2),
        p10_us=round(taken.p10_us, 2),
        p90_us=round(taken.p90_us, 2),
        limit_us=round(limit, 2),
        fraction_of_limit=round(limit / taken.us, 4),
        tflops=round(flops / taken.us / 1e6, 4),
        error=None if error is None else float(f"{error:.3g}"),
        runs=len(samples),
        workspace_bytes=None if contestant.is_peer else contestant.scratch_bytes(cell.T),
    )
