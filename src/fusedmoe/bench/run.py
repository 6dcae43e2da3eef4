"""Which cells are measured: shapes x dtypes x token counts x routings, or any list of cells."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch

from fusedmoe.bench.ceilings import (
    least_ceilings,
    lower_than,
    measure_ceilings,
    sound_ceilings,
)
from fusedmoe.bench.contestants import Contestant, contestant_name, our_layer
from fusedmoe.bench.measure import MEMORY_SHARE, Effort, in_words, measure
from fusedmoe.bench.peers import PEERS, default_peers, peer
from fusedmoe.bench.problems import SCOPES, Cell, Problem, Scope, Weights, random_weights
from fusedmoe.bench.report import BenchReport, make_header
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.config import MoEOptions
from fusedmoe.quantization.formats import format_named
from fusedmoe.testing.routing import routing_logits
from fusedmoe.testing.tolerances import format_name

Progress = Callable[[int, int, str], None]
"""Called before each problem: how many are done, of how many, and what comes next."""

_SITUATIONS_ON_CPU = 5
_COPIES_ON_CUDA, LEAST_COPIES_ON_CUDA = 4, 3
_DEFAULT_OPTIONS = MoEOptions()
_DEFAULT_EFFORT = Effort()


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
    options: MoEOptions = _DEFAULT_OPTIONS,
    formats: Sequence[str] = (),
    slow_machine: bool = False,
) -> BenchReport:
    """Time the layer from router logits to output on random data.

    ``experts``: implementations by name or class (None is what selection chooses); ``peers``:
    names of ``peers.PEERS``, or True for ``peers.default_peers``. ``repeats``: samples
    per implementation (default 20 on a CPU, 50 on a GPU). ``scope`` "experts" begins at given
    picks. ``options`` are those of this library's layer, but for ``experts``. ``formats``: also
    with experts rounded to these ("int4_g32", "fp8_block", "mxfp4", ...); their ``error`` is
    against the float weights. On a GPU every sample replays a CUDA graph over several sets of
    weights; what cannot be captured or does not fit becomes a note. ``slow_machine``: a GPU whose
    ceilings are lower than they should be is a note, too, and not refused.

    Raises ValueError for an empty list, unknown routing, scope, device, dtype, format or peer,
    classes of one name, and a slow machine (``ceilings.LEAST_CEILINGS``).
    """
    device = torch.device(device)
    check_request(shapes, tokens, dtypes, routings, device, scope, formats, peers, experts)
    cells = [
        Cell(shape, dtype, routing, T, scope)
        for shape in shapes
        for dtype in dtypes
        for routing in routings
        for T in tokens
    ]
    names = default_peers(device) if peers is True else tuple(peers or ())
    ceilings = (measure_ceilings if slow_machine else sound_ceilings)(device, tuple(dtypes))
    report = BenchReport(make_header(device, ceilings))
    if (low := lower_than(least_ceilings(device), ceilings)) is not None:
        report.notes.append(f"this machine is slow: {low}")
    run = run_cells(
        *(cells, report, device, experts, lambda cell: names, Effort(repeats), options, formats)
    )
    for done, cell in enumerate(run):
        if progress is not None:
            progress(done, len(cells), str(cell))
    return report


def check_request(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    routings: Sequence[str],
    device: torch.device,
    scope: str,
    formats: Sequence[str] = (),
    peers: bool | Sequence[str] = True,
    experts: Sequence[str | type | None] = (),
) -> None:
    """What ``run_layer_bench`` raises, before anything is measured."""
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
    for name in formats:
        format_named(name)
    for routing in routings:
        routing_logits(routing, 0, 1, 1)
    for name in () if isinstance(peers, bool) else peers:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    called: dict[str, str | type | None] = {}
    for one in experts:
        name = contestant_name(one)
        if called.setdefault(name, one) != one:
            raise ValueError(
                f"{called[name]} and {one} would both be called {name}: give each class a name"
            )


def run_cells(
    cells: Iterable[Cell],
    report: BenchReport,
    device: torch.device,
    experts: Sequence[str | type | None] = (None,),
    peers: Callable[[Cell], Sequence[str]] = lambda cell: (),
    effort: Effort = _DEFAULT_EFFORT,
    options: MoEOptions = _DEFAULT_OPTIONS,
    formats: Sequence[str] = (),
) -> Iterator[Cell]:
    """Measure cells into ``report``, yielding each one before it begins.

    ``peers``: names of ``peers.PEERS`` for each cell. ``formats``: each of ours is measured
    with floats, and with experts rounded to each of these. Neighbours of the same shape and dtype
    share weights. ``report``'s header has the ceilings.
    """
    for (shape, dtype), some in groupby(cells, key=lambda cell: (cell.shape, cell.dtype)):
        group = list(some)
        most = max(cell.T for cell in group)
        torch.manual_seed(0)
        weights = random_weights(shape, dtype, device, _copies(shape, dtype, device))
        if device.type == "cuda" and len(weights) < LEAST_COPIES_ON_CUDA:
            report.notes.append(
                f"{shape.name}: memory holds {len(weights)} sets of weights, not the "
                f"{LEAST_COPIES_ON_CUDA} that keep caches cold at any size"
            )
        built: dict[tuple[str, Scope], Contestant | None] = {}
        for cell in group:
            yield cell
            with torch.inference_mode():
                builders = _builders(experts, peers(cell), options, formats, most)
                contestants = _contestants(cell, weights, builders, built, report)
                situations = len(weights) if device.type == "cuda" else _SITUATIONS_ON_CPU
                problem = Problem.of(cell, situations, device)
                measure(problem, weights, contestants, effort, report)
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
    return max(1, min(_COPIES_ON_CUDA, int(free * MEMORY_SHARE) // one))


def _builders(
    experts: Sequence[str | type | None],
    peers: Sequence[str],
    options: MoEOptions,
    formats: Sequence[str],
    most_tokens: int,
) -> Mapping[str, Callable[..., Contestant]]:
    ours = {
        contestant_name(one, fmt): partial(
            our_layer,
            experts=one,
            options=replace(options, experts=one),
            format=fmt,
            most_tokens=most_tokens,
        )
        for fmt in (None, *formats)
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
    """The contestants that can run this cell; each is built once for its weights and scope."""
    for name, build in builders.items():
        if (name, cell.scope) in built:
            continue
        try:
            built[name, cell.scope] = build(cell.shape, weights, scope=cell.scope)
        except Exception as error:
            report.notes.append(f"{cell.shape.name}: {name} left out: {in_words(error)}")
            built[name, cell.scope] = None
    found = [built[name, cell.scope] for name in builders]
    return [one for one in found if one is not None]
