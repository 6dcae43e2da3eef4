"""From a layer to its table, and how much a layer without one loses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fusedmoe.bench.problems import Problem
from fusedmoe.bench.report import Percentiles, limit_us
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.testing.tolerances import format_name
from fusedmoe.tuning.choice import DeviceFacts, tiles_for
from fusedmoe.tuning.table_file import make_table
from fusedmoe.tuning.tiles import LayerTiles, TileConfig
from fusedmoe.tuning.tuned_kernels import TRITON
from fusedmoe.tuning.tuned_table import TunedTable
from fusedmoe.tuning.tuner.gemms import activation_of, key_of
from fusedmoe.tuning.tuner.journal import Journal, subject
from fusedmoe.tuning.tuner.measure import ROUTING, tuned_layer
from fusedmoe.tuning.tuner.search import Progress, Timer, between, search
from fusedmoe.tuning.tuner.space import H200

MAX_TOKENS = 1 << 20
COMPARED_SAMPLES = 31


class LayerTimer(Timer, Protocol):
    """A timer that can also run the whole experts."""

    def problem(self, T: int) -> Problem: ...

    def time_layer(
        self, T: int, choices: Sequence[LayerTiles], samples: int
    ) -> list[Percentiles]: ...


class Tuned(NamedTuple):
    """A table, and all that was measured on the way (``Journal.measurements``)."""

    table: TunedTable
    measurements: list[dict[str, Any]]


def checked_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    """Ascending, each once; ValueError where one is no token count or there are none."""
    if not tokens or min(tokens) < 1 or max(tokens) > MAX_TOKENS:
        raise ValueError(f"token counts must lie in [1, {MAX_TOKENS}], got {list(tokens)[:8]}")
    return tuple(sorted(set(tokens)))


def tune(
    shape: LayerShape,
    dtype: torch.dtype,
    facts: DeviceFacts,
    timer: Timer,
    tokens: Sequence[int],
    journal: Path,
    progress: Progress | None = None,
) -> Tuned:
    """Search for the tiles of ``shape``, going on where ``journal`` stopped.

    The journal stays until the caller has written the table and removes it. Raises ValueError
    where it is about something else, or where no tile runs.
    """
    if shape.ranks > 1:
        raise ValueError(
            f"{shape.name} gets picks of {shape.num_experts} experts: tune the {shape.E} it stores"
        )
    key, layer, tokens = key_of(shape, dtype), tuned_layer(shape, dtype), checked_tokens(tokens)
    remembering = Journal(timer, journal, subject(key, tokens, facts.name, facts.triton))

    def default(stage: str, T: int) -> TileConfig:
        found: TileConfig = getattr(default_tiles(shape, dtype, facts, T), stage)
        return found

    machine = H200._replace(shared_memory=facts.shared_memory)
    curves = search(layer, tokens, remembering, default, machine, progress)
    table = make_table(
        device=facts.name,
        kernel=TRITON.name,
        kernel_version=TRITON.version,
        triton=facts.triton,
        layer=key,
        tokens=between(tokens),
        curves=curves,
    )
    return Tuned(table, remembering.measurements)


def default_tiles(shape: LayerShape, dtype: torch.dtype, facts: DeviceFacts, T: int) -> LayerTiles:
    """What a layer of this shape uses that has no table."""
    sizes = T, shape.k, shape.E, shape.H, shape.I
    return tiles_for(*sizes, dtype, activation_of(shape)[0], facts._replace(triton=None))


def compare(
    shape: LayerShape,
    dtype: torch.dtype,
    facts: DeviceFacts,
    timer: LayerTimer,
    table: TunedTable,
    tokens: Sequence[int],
    ceilings: dict[str, float],
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Rows for a results file: the experts with the table's tiles and with the default ones.

    ``loss`` is how much longer the default ones take. ``measured``: whether the table was measured
    at that token count, or chose between two others.
    """
    key, rows = format_name(dtype), []
    for done, T in enumerate(tokens):
        if progress is not None:
            progress(done, len(tokens), f"{T} tokens, table against default")
        choices = LayerTiles(*table.tiles(T)), default_tiles(shape, dtype, facts, T)
        problem = timer.problem(T)
        tuned, default = timer.time_layer(T, choices, COMPARED_SAMPLES)
        limit = limit_us(problem, ceilings["read_gbs"], ceilings[f"{key}_tflops"])
        common = {
            "impl": "fusedmoe:triton",
            "shape": shape.name,
            **{name: getattr(shape, name) for name in "EkHI"},
            "T": T,
            "format": key,
            "routing": ROUTING,
            "scope": "experts",
            "measured": T in table.tokens,
        }
        for name, taken in (("table", tuned), ("default", default)):
            rows.append(
                common
                | {"tiles": name, "us": round(taken.us, 2)}
                | {"p10_us": round(taken.p10_us, 2), "p90_us": round(taken.p90_us, 2)}
                | {"limit_us": round(limit, 2), "fraction_of_limit": round(limit / taken.us, 4)}
                | {"tflops": round(problem.flops / taken.us / 1e6, 2)}
                | {"loss": round(taken.us / tuned.us - 1.0, 4)}
            )
    return rows
