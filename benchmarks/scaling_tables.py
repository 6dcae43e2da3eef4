"""The measured sections of docs/scaling.md; ``readme_tables.py`` writes them.

A file that is not there yet makes a section that says so, and how the file is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wire_targets import as_chosen, reached

RESULTS = Path(__file__).resolve().parent / "results"
HOSTS = ("h200-x4", "h200-x2")
Row = dict[str, Any]
Report = dict[str, Any]

TIMES = ("us", "wire_limit_us", "nccl_us")
SHAPES = {"deepseek-v3": "DeepSeek-V3", "qwen3-235b": "Qwen3-235B"}
FORMATS = {"bf16": "bf16", "fp8_block": "fp8 in blocks, weights and rows"}
PHASES = {"before": "experts in order", "moving": "while experts move", "after": "balanced"}


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(head) + "\n"
    first, *rest = (f"| {' | '.join(line)} |\n" for line in (head, *body))
    return first + rule + "".join(rest)


def time_of(us: float) -> str:
    if us >= 10_000:
        return f"{us / 1000:.2f} ms"
    return f"{us:.0f} us" if us >= 100 else f"{us:.1f} us"


def report_of(name: str) -> Report | None:
    """A file of ``results``, if there is one."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def link(name: str) -> str:
    return f"[benchmarks/results/{name}](../benchmarks/results/{name})"


def absent(name: str) -> str:
    return f"No `{name}` is recorded yet.\n"


def expert_load_section() -> str:
    report = report_of("cpu/expert_load.json")
    if report is None:
        return absent("cpu/expert_load.json")
    body = [
        [
            str(row["ranks"]),
            str(row["redundant_experts"]),
            f"{row['in_order']:.3g}",
            *(f"{row[name]:.3f}" for name in ("published", "ours", "ours_later")),
            f"{row['bound']:.2f}",
        ]
        for row in report["rows"]
    ]
    head = ["ranks", "redundant experts", "in order", "published", "ours", "ours, on later tokens"]
    return table([*head, "asked"], body)


def of_hosts(names: Sequence[str], section: Callable[[Report, str], str]) -> str:
    """``section`` of each file of these names, for every host that has one."""
    paths = [f"{host}/{name}" for host in HOSTS for name in names]
    found = [section(report, path) for path in paths if (report := report_of(path)) is not None]
    return "\n".join(found) or absent(names[-1])


def all_to_all_section() -> str:
    return of_hosts(["all_to_all.json"], of_wire)


def layers_section() -> str:
    return of_hosts(["ep_layer_fp8.json", "ep_layer.json"], of_layers)


def balance_section() -> str:
    return of_hosts(["balance.json"], of_balance)


def of_wire(report: Report, name: str) -> str:
    rows = [as_chosen(row) for row in sorted(report["rows"], key=lambda row: row["T"])]
    ranks, gbs = rows[0]["ranks"], report["p2p_gbs"]
    body = []
    for row in rows:
        times = [row[name] for name in TIMES]
        met = reached(ranks, row["T"], *times)
        verdict = "-" if met is None else "reached" if met else "missed"
        body.append([str(row["T"]), *map(time_of, times), verdict])
    head = ["tokens per rank", "`peer`", "wire limit", "NCCL all-gather + reduce-scatter", "asked"]
    return (
        f"{ranks} GPUs; a peer-to-peer copy reaches {gbs:.0f} GB/s there\n({link(name)}):\n\n"
        + table(head, body)
    )


def of_layers(report: Report, name: str) -> str:
    """One table per shape: the largest number of ranks, and the scaling up to there."""
    layers = [row for row in report["rows"] if row["scope"] == "layer"]
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in layers):
        here = [row for row in layers if row["shape"] == shape]
        most = max(row["ranks"] for row in here)
        ways = list(dict.fromkeys(row["impl"] for row in here if row["ranks"] == most))
        sizes = sorted({row["T"] for row in here if row["ranks"] == most})
        title = f"{SHAPES.get(shape, shape)}, {FORMATS[here[0]['format']]}, {most} GPUs"
        head = ["tokens per rank", "experts alone", "wire limit"]
        names = [f"`{way.removeprefix('fusedmoe:')}`" for way in ways]
        head += [*names, f"exposed by {names[0]}"]
        counts = sorted({row["ranks"] for row in here if row["ranks"] > 1})
        head += ["asked", *(f"scaling to {n}" for n in counts)]
        body = [line_of(here, T, most, ways, counts) for T in sizes]
        parts.append(f"{title} ({link(name)}):\n\n" + table(head, body))
    return "\n".join(parts)


def line_of(rows: list[Row], T: int, most: int, ways: list[str], counts: list[int]) -> list[str]:
    found = {(row["ranks"], row["impl"]): row for row in rows if row["T"] == T}
    here = [found.get((most, way)) for way in ways]
    some = next(row for row in here if row is not None)
    asked = some["target_met"] is not None
    limit = time_of(some["overlap_limit_us"]) if asked else "-"
    best = []
    for count in counts:
        reached = [row.get("scaling", 0.0) for (n, _), row in found.items() if n == count]
        best.append(max(reached, default=0.0))
    return [
        str(T),
        time_of(some["experts_us"]),
        time_of(some["wire_limit_us"]),
        *("-" if row is None else time_of(row["us"]) for row in here),
        "-" if here[0] is None else exposed(here[0]),
        limit,
        *(f"{value:.2f}" if value else "-" for value in best),
    ]


def exposed(row: Row) -> str:
    """What a layer takes beyond its experts, and what share of its time that is."""
    us = row["us"] - row["experts_us"]
    return f"{time_of(us)}, {100 * us / row['us']:.0f} %"


def of_balance(report: Report, name: str) -> str:
    phases = {row["phase"]: row for row in report["rows"]}
    some, moving = phases["before"], phases["moving"]
    body = [
        [
            title,
            time_of(phases[phase]["us"]),
            f"{phases[phase]['imbalance']:.2f}" if "imbalance" in phases[phase] else "-",
            f"{phases[phase]['error']:.1e}" if "error" in phases[phase] else "-",
        ]
        for phase, title in PHASES.items()
    ]
    shape = SHAPES.get(some["shape"], some["shape"])
    lines = (
        f"{some['layers']} layers of {shape} in bf16 over {some['ranks']} GPUs, {some['T']} tokens "
        "per rank,",
        f"{some['redundant_experts']} redundant experts; {moving['slots_changed']} slots got "
        f"another expert in {moving['steps']} steps;",
        f"{moving['beside_messages']} replays began while experts were on their way",
        f"({link(name)}).",
        "",
    )
    head = ["", "a forward", "max / mean picks of a rank", "largest difference"]
    return "".join(f"{line}\n" for line in lines) + table(head, body)


SECTIONS: dict[str, Callable[[], str]] = {
    "expert_load": expert_load_section,
    "all_to_all": all_to_all_section,
    "layers": layers_section,
    "balance": balance_section,
}
