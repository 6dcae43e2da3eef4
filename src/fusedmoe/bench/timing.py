"""Interleaved timing: on a CPU by the clock, on a GPU by replaying CUDA graphs.

A contestant is a list of calls, one per situation (a set of weights, or of logits, that no cache
still holds); each sample uses the next one, and the contestants start at different ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from fusedmoe.runner.capture import record_graph

Call = Callable[[], torch.Tensor]

SLOW_FACTOR = 4.0
SLOW_RUNS = 3
_SHORT_SECONDS = 0.5
_CALLS_PER_GRAPH = 10


def time_on_cpu(contestants: Mapping[str, Sequence[Call]], repeats: int) -> dict[str, list[float]]:
    """Microseconds of each call, ``repeats`` per contestant, taken in turns.

    An untimed call in another situation comes before each short sample: in a model, too, the
    layer before ran the same code on other weights. A contestant more than ``SLOW_FACTOR`` times
    slower than the fastest is left after ``SLOW_RUNS`` samples.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    short = {name: _seconds(calls[0]) < _SHORT_SECONDS for name, calls in contestants.items()}
    names = list(contestants)
    for turn in range(repeats):
        if turn == SLOW_RUNS:
            best = min(min(taken) for taken in samples.values())
            names = [name for name in names if min(samples[name]) <= SLOW_FACTOR * best]
        for place in range(len(names)):
            at = (turn + place) % len(names)
            calls = contestants[names[at]]
            before, call = (calls[(turn + at + step) % len(calls)] for step in (-1, 0))
            if short[names[at]]:
                before()
            samples[names[at]].append(_seconds(call) * 1e6)
    return samples


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def capture(calls: Sequence[Call]) -> Call:
    """A CUDA graph that makes all calls a few times over; it returns the first call's output.

    Raises RuntimeError where they cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = rounds_of(calls)
    graph, outputs = record_graph(lambda: [call() for _ in range(rounds) for call in calls], stream)
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> torch.Tensor:
        graph.replay()
        return outputs[0]

    return replay


def rounds_of(calls: Sequence[Call]) -> int:
    """How often one graph goes through all calls."""
    return max(1, _CALLS_PER_GRAPH // len(calls))


def time_graphs(
    graphs: Mapping[str, Call], calls_per_graph: int, repeats: int
) -> dict[str, list[float]]:
    """Microseconds per call from CUDA events around each replay, taken in turns."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in graphs.values():
        replay()
    torch.cuda.synchronize()
    for _ in range(repeats):
        for name, replay in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / calls_per_graph)
    return samples
