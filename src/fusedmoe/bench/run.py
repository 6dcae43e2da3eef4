"""``run_layer_bench``: shapes x dtypes x token counts x routings, one table out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.contestants import (
    TRANSFORMERS_EXPERTS,
    Contestant,
    Weights,
    contestant_name,
    our_layer,
    random_weights,
    transformers_experts,
)
from fusedmoe.bench.report import BenchReport, BenchRow, Percentiles, limit_us, make_header
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.bench.timing import Call, capture, rounds_of, time_graphs, time_on_cpu
from fusedmoe.experts.cpu_memory import host_memory
from fusedmoe.experts.torch_reference import experts_reference
from fusedmoe.testing.routing import routing_logits
from fusedmoe.testing.tolerances import format_name, relative_error

Progress = Callable[[int, int, str], None]
"""Called before each problem: how many are done, of how many, and what comes next."""

_SITUATIONS_ON_CPU = 5
_COPIES_ON_CUDA = 4
_MEMORY_SHARE = 0.6
_CHECKED_TOKENS = 3


@dataclass(frozen=True)
class Problem:
    """One cell of the table. ``logits``: one per situation."""

    shape: LayerShape
    dtype: torch.dtype
    routing: str
    T: int
    x: torch.Tensor
    logits: list[torch.Tensor]

    def __str__(self) -> str:
        return f"{self.shape.name} {format_name(self.dtype)} {self.routing} T={self.T}"

    @property
    def active_experts(self) -> float:
        """Experts that some token picks, averaged over the situations."""
        counts = [one.topk(self.shape.k).indices.unique().numel() for one in self.logits]
        return sum(counts) / len(counts)


def count_measurements(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    routings: Sequence[str],
) -> int:
    """How many problems a run has (what progress counts)."""
    return len(shapes) * len(tokens) * len(dtypes) * len(routings)


@torch.inference_mode()
def run_layer_bench(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    routings: Sequence[str] = ("uniform",),
    device: torch.device | str = "cpu",
    peers: bool = True,
    repeats: int | None = None,
    progress: Progress | None = None,
    *,
    experts: Sequence[str | type | None] = (None,),
) -> BenchReport:
    """Time the layer from router logits to output on random data.

    ``experts``: implementations by name or class (None is what selection chooses); ``peers`` adds
    Transformers' batched_mm, grouped_mm and (on a CPU) eager. ``repeats``: samples per
    implementation (default 20 on a CPU, 50 on a GPU). On a GPU every sample replays a CUDA graph
    over several sets of weights; what cannot be captured or does not fit becomes a note.

    Raises ValueError for an empty list, unknown routing, device or dtype.
    """
    device = torch.device(device)
    _check(shapes, tokens, dtypes, routings, device)
    ceilings = measure_ceilings(device, tuple(dtypes))
    report = BenchReport(make_header(device, ceilings))
    total, done = count_measurements(shapes, tokens, dtypes, routings), 0
    for shape in shapes:
        for dtype in dtypes:
            torch.manual_seed(0)
            weights = random_weights(shape, dtype, device, _copies(shape, dtype, device))
            contestants = _contestants(shape, weights, peers, experts, report)
            for problem in _problems(shape, dtype, routings, tokens, len(weights), device):
                if progress is not None:
                    progress(done, total, str(problem))
                _measure(problem, weights, contestants, repeats, report)
                done += 1
            del weights, contestants
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return report


def _check(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    routings: Sequence[str],
    device: torch.device,
) -> None:
    if not (shapes and tokens and dtypes and routings):
        raise ValueError("a benchmark needs a shape, a token count, a dtype and a routing")
    if min(tokens) < 1:
        raise ValueError(f"token counts must be at least 1, got {min(tokens)}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"cannot measure on {device}; choose cpu or cuda")
    for dtype in dtypes:
        format_name(dtype)
    for routing in routings:
        routing_logits(routing, 0, 1, 1)


def _copies(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> int:
    """Sets of weights: on a GPU several, as far as memory goes; on a CPU logits vary instead."""
    if device.type == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    one = shape.weight_elements * dtype.itemsize
    return max(1, min(_COPIES_ON_CUDA, int(free * _MEMORY_SHARE) // one))


def _contestants(
    shape: LayerShape,
    weights: list[Weights],
    peers: bool,
    experts: Sequence[str | type | None],
    report: BenchReport,
) -> list[Contestant]:
    builders = {contestant_name(one): partial(our_layer, experts=one) for one in experts}
    if peers:
        # Its eager loop reads ids on the host, so that no CUDA graph can hold it.
        left_out = ("eager",) if weights[0].w1.is_cuda else ()
        builders |= {
            f"transformers_{name}": partial(transformers_experts, name=name)
            for name in TRANSFORMERS_EXPERTS
            if name not in left_out
        }
    found = []
    for name, build in builders.items():
        try:
            found.append(build(shape, weights))
        except ValueError as error:
            report.notes.append(f"{shape.name}: {name} left out: {error}")
    return found


def _problems(
    shape: LayerShape,
    dtype: torch.dtype,
    routings: Sequence[str],
    tokens: Sequence[int],
    copies: int,
    device: torch.device,
) -> Iterator[Problem]:
    situations = copies if device.type == "cuda" else _SITUATIONS_ON_CPU
    for routing in routings:
        for T in tokens:
            logits = [
                routing_logits(routing, T, shape.E, shape.k, seed, device)
                for seed in range(situations)
            ]
            x = torch.randn(T, shape.H, device=device).to(dtype)
            yield Problem(shape, dtype, routing, T, x, logits)


def _measure(
    problem: Problem,
    weights: list[Weights],
    contestants: list[Contestant],
    repeats: int | None,
    report: BenchReport,
) -> None:
    running: dict[str, list[Call]] = {}
    for one in contestants:
        if (reason := _does_not_fit(one, problem)) is not None:
            report.notes.append(f"{problem}: {one.name} left out: {reason}")
            continue
        running[one.name] = [
            partial(one.forwards[i % len(weights)], problem.x, logits)
            for i, logits in enumerate(problem.logits)
        ]
    if problem.x.is_cuda:
        samples, outputs = _run_on_cuda(problem, running, repeats or 50, report)
    else:
        samples = time_on_cpu(running, repeats or 20)
        outputs = {name: running[name][0]() for name in samples}
    scratch = {one.name: one.scratch_bytes(problem.T) for one in contestants if not one.is_peer}
    for name, taken in samples.items():
        error = _error(problem, weights[0], outputs[name])
        report.add(_row(problem, name, taken, error, scratch.get(name), report))


def _run_on_cuda(
    problem: Problem, running: dict[str, list[Call]], repeats: int, report: BenchReport
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    graphs: dict[str, Call] = {}
    for name, calls in running.items():
        try:
            graphs[name] = capture(calls)
        except RuntimeError as error:  # also torch.cuda.OutOfMemoryError
            why = str(error).splitlines()[0]
            report.notes.append(f"{problem}: {name} left out, not captured: {why}")
            torch.cuda.synchronize()
    per_graph = {name: len(running[name]) * rounds_of(running[name]) for name in graphs}
    samples = time_graphs(graphs, next(iter(per_graph.values()), 1), repeats)
    return samples, {name: replay().clone() for name, replay in graphs.items()}


def _does_not_fit(contestant: Contestant, problem: Problem) -> str | None:
    needed, free = contestant.scratch_bytes(problem.T), _free_memory(problem.x.device)
    if needed is None or free is None or needed <= free * _MEMORY_SHARE:
        return None
    return f"needs {needed / 2**30:.1f} GiB of scratch memory, {free / 2**30:.1f} are free"


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = host_memory()
    return None if memory is None else memory.available


def _error(problem: Problem, weights: Weights, out: torch.Tensor) -> float:
    """Relative Frobenius error of a few tokens of the first situation, against fp64."""
    tokens = sorted({round(i * (problem.T - 1) / _CHECKED_TOKENS) for i in range(_CHECKED_TOKENS)})
    scores = problem.logits[0][tokens].double().softmax(-1)
    picked, ids = scores.topk(problem.shape.k)
    reference = experts_reference(
        problem.x[tokens].double(),
        weights.w1,
        weights.w2,
        picked / picked.sum(-1, keepdim=True),
        ids,
        compute_dtype=torch.float64,
    )
    return relative_error(out[tokens], reference).frobenius


def _row(
    problem: Problem,
    name: str,
    samples: list[float],
    error: float,
    workspace_bytes: int | None,
    report: BenchReport,
) -> BenchRow:
    shape, key = problem.shape, format_name(problem.dtype)
    taken = Percentiles.of(samples)
    limit = limit_us(
        shape,
        problem.T,
        problem.active_experts,
        problem.dtype.itemsize,
        report.header["read_gbs"],
        report.header[f"{key}_tflops"],
    )
    return BenchRow(
        impl=name,
        shape=shape.name,
        E=shape.E,
        k=shape.k,
        H=shape.H,
        I=shape.I,
        T=problem.T,
        format=key,
        routing=problem.routing,
        active_experts=problem.active_experts,
        scope="layer",
        us=round(taken.us, 2),
        p10_us=round(taken.p10_us, 2),
        p90_us=round(taken.p90_us, 2),
        limit_us=round(limit, 2),
        fraction_of_limit=round(limit / taken.us, 4),
        tflops=round(shape.flops(problem.T) / taken.us / 1e6, 4),
        error=float(f"{error:.3g}"),
        runs=len(samples),
        workspace_bytes=workspace_bytes,
    )
