"""The schema of results: a header that says where and how, and one row per measurement."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fusedmoe
from fusedmoe.bench.problems import Problem
from fusedmoe.tuning.table_file import write_atomically
from fusedmoe.words import device_name, package_version


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One implementation on one problem. Times are microseconds per call.

    ``E`` experts are on this rank, of ``num_experts`` on all. ``scope``: ``layer`` from router
    logits, ``experts`` from given picks, ``gemms`` sorted rows and no sum, ``dense`` another
    product. ``timed``: ``graph`` replays a CUDA graph, ``launches`` launches anew.

    ``limit_us`` is what the measured ceilings allow: the larger of bytes over read bandwidth and
    FLOPs over the format's matmul rate, bytes being the activated experts' weights plus the input
    and the output once. ``error`` is relative (Frobenius), against fp64 on a few tokens.
    ``active_experts`` counts this rank's experts that some token picks, and ``pairs`` the picks of
    its experts, both averaged over the runs' inputs. ``workspace_bytes`` is the scratch memory
    that the layer plans (None where it is not ours).
    """

    impl: str
    shape: str
    E: int
    num_experts: int
    k: int
    H: int
    I: int  # noqa: E741
    T: int
    format: str
    routing: str
    active_experts: float
    pairs: float
    scope: str
    timed: str
    us: float
    p10_us: float
    p90_us: float
    limit_us: float
    fraction_of_limit: float
    tflops: float
    error: float | None
    runs: int
    workspace_bytes: int | None


@dataclass(frozen=True)
class Percentiles:
    """The median of some times and their tenth and ninetieth percentiles, in microseconds."""

    us: float
    p10_us: float
    p90_us: float

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> Percentiles:
        ordered = sorted(samples_us)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        )

    def rounded(self, digits: int = 2) -> dict[str, Any]:
        """As columns of a row."""
        return {name: round(value, digits) for name, value in asdict(self).items()}


@dataclass
class BenchReport:
    """``header``: device, versions, command, ceilings. ``notes``: what was left out, and why."""

    header: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> BenchReport:
        """What ``write`` wrote."""
        header = json.loads(Path(path).read_text())
        rows, notes = header.pop("rows"), header.pop("notes")
        return cls(header, rows, notes)

    def add(self, row: BenchRow) -> None:
        self.rows.append(asdict(row))

    def to_json(self) -> dict[str, Any]:
        """The whole report as JSON takes it; ceilings and versions stand at the top level."""
        return self.header | {"rows": self.rows, "notes": self.notes}

    def write(self, path: str | Path) -> None:
        """As JSON, and never half a file."""
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    def write_with_csv(self, path: Path) -> None:
        """As JSON, and the rows as CSV beside it."""
        self.write(path)
        self.write_csv(path.with_suffix(".csv"))

    def write_csv(self, path: str | Path) -> None:
        """The rows alone, one line each under a line of names."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(path, text.getvalue())

    def ratios(self, ours: str = "fusedmoe", peers: str = "transformers") -> list[dict[str, Any]]:
        """Per problem, the fastest peer's time over ours (above 1: ours is faster)."""
        problems: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in self.rows:
            if row["scope"] == "layer":
                key = tuple(row[name] for name in ("shape", "format", "routing", "T"))
                problems.setdefault(key, {})[row["impl"]] = row["us"]
        found = []
        for (shape, format_, routing, T), times in problems.items():
            others = {name: us for name, us in times.items() if name.startswith(peers)}
            if ours in times and others:
                best = min(others, key=lambda name: others[name])
                found.append(
                    {"shape": shape, "format": format_, "routing": routing, "T": T}
                    | {"fastest_peer": best, "ratio": others[best] / times[ours]}
                )
        return found


def least_us(moved: float, flops: float, read_gbs: float, tflops: float) -> float:
    """Microseconds that ``moved`` bytes and ``flops`` take at these rates, whichever is longer."""
    return max(moved / read_gbs / 1e3, flops / tflops / 1e6)


def limit_us(
    problem: Problem, read_gbs: float, matmul_tflops: float, weight_bytes: int | None = None
) -> float:
    """Microseconds that a layer cannot go below on a machine with these ceilings.

    ``weight_bytes``: of all experts, where they are not in the problem's dtype.
    """
    shape, itemsize = problem.cell.shape, problem.cell.dtype.itemsize
    stored = shape.weight_elements * itemsize if weight_bytes is None else weight_bytes
    moved = stored / shape.E * problem.active_experts + 2 * itemsize * problem.cell.T * shape.H
    return least_us(moved, problem.flops, read_gbs, matmul_tflops)


def make_header(device: torch.device, ceilings: dict[str, float]) -> dict[str, Any]:
    """The header of a report: where it comes from, and the ceilings measured in the same run."""
    packages = ("torch", "triton", "transformers")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {
            "python": platform.python_version(),
            "fusedmoe": fusedmoe.__version__,
            **{name: package_version(name) for name in packages},
        },
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": source_commit(),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "date": date.today().isoformat(),
    } | ceilings


def _program() -> str:
    """How this process was started, without where its files lie."""
    name = Path(sys.argv[0]).name
    return "python -m fusedmoe.cli" if name == "__main__.py" else name


def source_commit() -> str | None:
    """The commit of the source tree this package runs from; None where it is installed.

    A copy of the tree without its history may be told by the variable FUSEDMOE_COMMIT.
    """
    if told := os.environ.get("FUSEDMOE_COMMIT"):
        return told
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
