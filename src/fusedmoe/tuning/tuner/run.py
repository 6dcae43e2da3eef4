"""From a layer to its table, and how much a layer without one loses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fusedmoe.bench.problems import Problem
from fusedmoe.bench.report import Percentiles, limit_us
from fusedmoe.testing.tolerances import format_name
from fusedmoe.tuning.choice import DeviceFacts
from fusedmoe.tuning.table_file import make_table
from fusedmoe.tuning.tile_records import Tile
from fusedmoe.tuning.tuned_table import TunedTable
from fusedmoe.tuning.tuner.hopper_layer import HopperLayer
from fusedmoe.tuning.tuner.journal import Journal, subject
from fusedmoe.tuning.tuner.measure import ROUTING
from fusedmoe.tuning.tuner.search import Progress, Timer, between, search
from fusedmoe.tuning.tuner.triton_layer import TritonLayer
from fusedmoe.tuning.tuner.tunable import Tunable

TUNABLES: dict[str, type[Tunable]] = {one.kernel.name: one for one in (TritonLayer, HopperLayer)}
MAX_TOKENS = 1 << 20
COMPARED_SAMPLES = 31


class LayerTimer(Timer, Protocol):
    """A timer that can also run the whole experts."""

    def problem(self, T: int) -> Problem: ...

    def time_layer(
        self, T: int, choices: Sequence[tuple[Tile, ...]], samples: int
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
    tunable: Tunable,
    facts: DeviceFacts,
    timer: Timer,
    tokens: Sequence[int],
    journal: Path,
    progress: Progress | None = None,
) -> Tuned:
    """Search for the tiles of a layer, going on where ``journal`` stopped.

    The journal stays until the caller has written the table and removes it. Raises ValueError
    where it is about something else, or where no tile runs.
    """
    shape, kernel = tunable.shape, tunable.kernel
    if shape.ranks > 1:
        raise ValueError(
            f"{shape.name} gets picks of {shape.num_experts} experts: tune the {shape.E} it stores"
        )
    tokens = checked_tokens(tokens)
    about = subject(kernel, tunable.key, tokens, facts.name, facts.triton)
    remembering = Journal(timer, journal, about)
    curves = search(tunable.space(facts), tokens, remembering, progress)
    table = make_table(
        device=facts.name,
        kernel=kernel.name,
        kernel_version=kernel.version,
        triton=facts.triton,
        layer=tunable.key,
        tokens=between(tokens),
        curves=curves,
    )
    return Tuned(table, remembering.measurements)


def compare(
    tunable: Tunable,
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
    shape, kernel, space = tunable.shape, tunable.kernel, tunable.space(facts)
    key, rows = format_name(tunable.dtype), []
    for done, T in enumerate(tokens):
        if progress is not None:
            progress(done, len(tokens), f"{T} tokens, table against default")
        choices = table.tiles(T), tuple(space.default(stage, T) for stage in kernel.stages)
        problem = timer.problem(T)
        tuned, default = timer.time_layer(T, choices, COMPARED_SAMPLES)
        limit = limit_us(problem, ceilings["read_gbs"], ceilings[f"{key}_tflops"])
        common = {
            "impl": f"fusedmoe:{kernel.name}",
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
