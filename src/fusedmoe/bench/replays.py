"""Timing on a GPU: calls recorded as CUDA graphs and replayed in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fusedmoe.bench.timing import Call
from fusedmoe.runner.capture import record_graph

# A graph runs so long that its launch does not count; calls longer than _LONG_CALL_US get one each.
_GRAPH_US = 2000.0
_LONG_CALL_US = 1000.0
_MAX_CALLS = 80
# Peers are sampled for _LONG_MS, but at least as often as a median needs. This package gets all of
# its samples, however long they take.
_LONG_MS, FEWEST_SAMPLES = 500.0, 12


@dataclass(frozen=True)
class Replays:
    """``graphs`` (or plain launches) to run in turns, each of ``calls`` calls, ``repeats`` in all;
    no fewer than ``at_least``, however long they take.

    Each returns the output of its first call; the first one's is that of the first situation.
    """

    graphs: Sequence[Call]
    calls: int
    repeats: int
    at_least: int = FEWEST_SAMPLES


def record(calls: Sequence[Call], expected_us: float, repeats: int) -> Replays:
    """Record ``calls``, one per situation, which take about ``expected_us`` each.

    Raises RuntimeError where they cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    if expected_us >= _LONG_CALL_US:
        return Replays([_graph_of([call], stream) for call in calls], 1, repeats)
    rounds = calls_per_graph(len(calls), expected_us) // len(calls)
    return Replays([_graph_of(list(calls) * rounds, stream)], rounds * len(calls), repeats)


def calls_per_graph(situations: int, expected_us: float) -> int:
    """Whole rounds through all situations that fill a graph."""
    rounds = math.ceil(_GRAPH_US / max(expected_us, 1.0) / situations)
    return situations * max(1, min(rounds, _MAX_CALLS // situations))


def _graph_of(calls: Sequence[Call], stream: torch.cuda.Stream) -> Call:
    graph, outputs = record_graph(lambda: [call() for call in calls], stream)
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> torch.Tensor:
        graph.replay()
        return outputs[0]

    return replay


def launched(calls: Sequence[Call], repeats: int) -> Replays:
    """What no graph can hold: launched anew each time."""
    return Replays(calls, 1, repeats)


def time_in_turns(contestants: Mapping[str, Replays], rest: float = 0.0) -> dict[str, list[float]]:
    """Microseconds per call, from CUDA events around each replay, one of each in turn.

    After each replay the GPU idles for ``rest`` times as long as it took. What takes long gets
    fewer samples than it asks for, but ``at_least`` as many as it says.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    spent_ms = dict.fromkeys(contestants, 0.0)
    for one in contestants.values():
        for replay in one.graphs:
            replay()
    torch.cuda.synchronize()
    for turn in range(max((one.repeats for one in contestants.values()), default=0)):
        for name, one in contestants.items():
            is_long = turn >= one.at_least and spent_ms[name] > _LONG_MS
            if turn >= one.repeats or is_long:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            one.graphs[turn % len(one.graphs)]()
            end.record()
            end.synchronize()
            taken_ms = start.elapsed_time(end)
            samples[name].append(taken_ms * 1e3 / one.calls)
            spent_ms[name] += taken_ms
            time.sleep(rest * taken_ms / 1e3)
    return samples
