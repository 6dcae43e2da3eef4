"""Interleaved timing by the clock, for a CPU (``replays.py`` is the GPU's).

A contestant is a list of calls, one per situation (a set of weights, or of logits, that no cache
still holds); each sample uses the next one, and the contestants start at different ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], torch.Tensor]

SLOW_FACTOR = 4.0
SLOW_RUNS = 3
_SHORT_SECONDS = 0.5


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
        if turn == SLOW_RUNS and names:
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
