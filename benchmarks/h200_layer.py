"""The bf16 layer on one H200 against its limit, its peers and what it has to reach.

    python benchmarks/h200_layer.py [--out benchmarks/results/h200/layer_table.json] [--seconds 500]

From router logits, balanced routing unless said: CUDA-graph replays over several sets of weights,
normal numbers, implementations in turns, ceilings measured first. A run whose memory or matrix
units are slower than this GPU's is thrown away. The file grows cell by cell; started again, the
script goes on with what is missing, or measures cells anew (``--again``). Several GPUs share the
work by a table each (``--out``, ``--shapes``), which the first then takes in (``--join``). Where
products decide, it pauses after each sample as long as that took, for the card not to run into its
power limit. A CSV and a PNG are made of the same rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from h200_ceilings import LEAST_BF16_TFLOPS, LEAST_READ_GBS, h200_ceilings
from h200_targets import SKEWED, TARGETS, verdicts
from pictures import draw
from verdicts import print_verdicts

from fusedmoe.bench import SHAPES, BenchReport
from fusedmoe.bench.measure import REST, Effort
from fusedmoe.bench.problems import Cell, Scope
from fusedmoe.bench.report import make_header
from fusedmoe.bench.run import run_cells

PEER_BYTES = 24 << 30
DENSE_FROM = 1024  # tokens from which matrix units are what bounds a layer
SHAPES_IN_TABLE = tuple(dict.fromkeys(target.shape for target in TARGETS))
SKEW_TOKENS = (2048, 8192, 16384)
# Where Transformers' ways are to be beaten at every size.
COMPARED_SHAPES, COMPARED_TOKENS = ("qwen3-30b", "mixtral", "olmoe"), (1, 16, 128, 1024, 8192)
PEER_SHAPES = ("qwen3-30b", "mixtral", "deepseek-v3-ep8", "gpt-oss-120b")
PEER_TOKENS = (1, 8, 64, 512, 8192)
UNIFORM_TOKENS = (1, 8, 64, 512, 8192)
HOT_TOKENS = (1, 64, 4096)


def table(shapes: Sequence[str]) -> list[Cell]:
    """Every cell, the cells of one shape side by side, the small ones first."""
    cells: list[Cell] = []

    def add(shape: str, routing: str, tokens: Sequence[int], scope: Scope = "layer") -> None:
        cells.extend(Cell(SHAPES[shape], torch.bfloat16, routing, T, scope) for T in tokens)

    for shape in dict.fromkeys((*SHAPES_IN_TABLE, *PEER_SHAPES)):
        if shape not in shapes:
            continue
        if shape in SHAPES_IN_TABLE:
            asked = {T for target in TARGETS if target.shape == shape for T in target.tokens}
            extra = {4096} if shape == "qwen3-30b" else set()
            compared = COMPARED_TOKENS if shape in COMPARED_SHAPES else ()
            add(shape, "balanced", sorted({*asked, *SKEW_TOKENS, *extra, *compared}))
            add(shape, SKEWED, sorted({*SKEW_TOKENS, *extra}))
        if shape in ("qwen3-30b", "mixtral"):
            add(shape, "one_expert", HOT_TOKENS)
        if shape == "qwen3-30b":
            add(shape, "uniform", UNIFORM_TOKENS)
        if shape in PEER_SHAPES:
            add(shape, "uniform", PEER_TOKENS, "experts")
    return cells


def peers_of(cell: Cell) -> tuple[str, ...]:
    if cell.scope == "experts":
        return ("transformers_grouped_mm",)
    names = (
        "transformers_grouped_mm",
        "transformers_batched_mm",
        "torch_grouped_mm_alone",
        "torch_reference",
    )
    return (*names, "torch_mm") if cell.T >= DENSE_FROM else names


def open_report(path: Path, device: torch.device, least: tuple[float, float]) -> BenchReport:
    """The file so far, with this run's ceilings as its newest run; SystemExit if they are low."""
    ceilings = h200_ceilings(device, *least)
    header = make_header(device, ceilings)
    report = BenchReport.read(path) if path.exists() else BenchReport({"runs": []})
    report.header |= header
    about = {"commit": header["commit"], "date": header["date"], "rest": REST}
    report.header["runs"].append(about | ceilings)
    print({name: round(value, 1) for name, value in ceilings.items()}, file=sys.stderr)
    return report


def measure(args: argparse.Namespace) -> BenchReport:
    """Go through the cells that are missing until the time is up; save after each."""
    path, device, begin = Path(args.out), torch.device(args.device), time.monotonic()
    report = open_report(path, device, (args.least_read, args.least_rate))
    run, done = len(report.header["runs"]) - 1, report.header.setdefault("cells", [])
    wanted = [
        cell
        for cell in table(args.shapes)
        if (args.again or str(cell) not in done) and (not args.tokens or cell.T in args.tokens)
    ]
    current: Cell | None = None

    def save() -> None:
        for row in report.rows:
            row.setdefault("run", run)
        report.notes[:] = dict.fromkeys(report.notes)
        if current is not None:
            done.append(str(current))
        write(report, path)

    effort = Effort(args.repeats, PEER_BYTES)
    for cell in run_cells(wanted, report, device, (None, *args.experts), peers_of, effort):
        save()
        current = None
        elapsed = time.monotonic() - begin
        if args.seconds is not None and elapsed > args.seconds:
            print(f"time is up: {len(wanted) - wanted.index(cell)} cells left", file=sys.stderr)
            break
        print(f"{elapsed:6.1f} s  {cell}", file=sys.stderr, flush=True)
        forget(cell, report, done)
        current = cell
    save()
    return report


def write(report: BenchReport, path: Path) -> None:
    """With what was asked of the rows."""
    found = verdicts(report.rows, report.header["runs"])
    report.header["targets"] = [asdict(one) for one in found]
    report.write_with_csv(path)


def forget(cell: Cell, report: BenchReport, done: list[str]) -> None:
    """Drop what an earlier run found out about ``cell``."""
    name = str(cell)
    done[:] = [other for other in done if other != name]
    report.notes[:] = [note for note in report.notes if not note.startswith(f"{name}:")]
    report.rows[:] = [
        row
        for row in report.rows
        if (row["shape"], row["routing"], row["T"]) != (cell.shape.name, cell.routing, cell.T)
        or (row["scope"] == "experts") != (cell.scope == "experts")
    ]


def join(report: BenchReport, other: BenchReport) -> None:
    """Put the cells of ``other``, measured on another GPU of the kind, into ``report``."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["shape"], row["routing"], row["T"], row["scope"] == "experts"

    header, cells, anew = report.header, other.header["cells"], {key(row) for row in other.rows}
    runs = len(header["runs"])
    rows = [row for row in report.rows if key(row) not in anew]
    notes = [note for note in report.notes if note.split(": ")[0] not in cells]
    report.rows[:] = rows + [row | {"run": row["run"] + runs} for row in other.rows]
    report.notes[:] = notes + other.notes
    header["runs"] += other.header["runs"]
    header["cells"] = list(dict.fromkeys([*header["cells"], *cells]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/h200/layer_table.json")
    parser.add_argument("--seconds", type=float, help="start no new cell after so long")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--again", action="store_true", help="also what the file holds already")
    parser.add_argument("--experts", nargs="*", default=["triton"], help="more of ours")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--least-read", type=float, default=LEAST_READ_GBS)
    parser.add_argument("--least-rate", type=float, default=LEAST_BF16_TFLOPS)
    parser.add_argument("--only-report", action="store_true", help="measure nothing, read --out")
    parser.add_argument("--join", nargs="+", default=[], help="tables whose cells --out takes in")
    args = parser.parse_args()
    path = Path(args.out)
    reads = args.only_report or args.join
    report = BenchReport.read(path) if reads else measure(args)
    for other in args.join:
        join(report, BenchReport.read(other))
    if args.join:
        write(report, path)
    print_verdicts(verdicts(report.rows, report.header["runs"]))
    draw(report.to_json(), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
