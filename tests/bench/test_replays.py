"""Samples are taken in turns, and what takes long does not hold up the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedmoe.bench import replays
from fusedmoe.bench.replays import Replays, time_in_turns


@pytest.fixture
def clock(monkeypatch):
    """CUDA's events and rests over a clock of milliseconds that calls move on."""
    now = {"ms": 0.0, "rested": 0.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now["ms"]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(replays.time, "sleep", lambda s: now.update(rested=now["rested"] + s * 1e3))
    return now


def calls_of(clock, ms, calls=1, repeats=50):
    def replay():
        clock["ms"] += ms

    return Replays([replay], calls, repeats)


def test_every_one_gets_its_samples_per_call(clock):
    found = time_in_turns({"a": calls_of(clock, 2.0, calls=4), "b": calls_of(clock, 1.0)}, 1.0)
    assert found["a"] == [500.0] * 50
    assert found["b"] == [1000.0] * 50
    assert clock["rested"] == pytest.approx(150.0)


def test_long_ones_are_sampled_less_but_never_too_little(clock):
    contestants = {
        "short": calls_of(clock, 1.0),
        "long": calls_of(clock, 30.0),
        "longer": calls_of(clock, 400.0),
        "all": replace(calls_of(clock, 400.0), at_least=50),
        "few": calls_of(clock, 400.0, repeats=5),
    }
    found = time_in_turns(contestants)
    assert {name: len(taken) for name, taken in found.items()} == {
        "short": 50,
        "long": 17,
        "longer": 12,
        "all": 50,
        "few": 5,
    }
