"""Pictures of a benchmark report and of the load of ranks. They need matplotlib.

That of a report (speed against batch, and the roofline) reads its JSON alone, a header with
measured ceilings, and rows, so that a file of last month draws like one of today. Per shape, format
and routing there are two axes.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusedmoe.quantization.formats import format_named
from fusedmoe.words import DTYPE_NAMES

Row = dict[str, Any]

WIDTH, HEIGHT_PER_GROUP, DOTS_PER_INCH = 13.0, 3.8, 130
LOAD_WIDTH, LOAD_HEIGHT, LOAD_DOTS_PER_INCH = 4.0, 3.2, 110


def check_can_draw(path: str | Path) -> None:
    """Raise ValueError without matplotlib, or for a kind of file that it does not write."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install 'fusedmoe[bench]'")
    from matplotlib.backend_bases import FigureCanvasBase

    kind, known = Path(path).suffix[1:].lower(), FigureCanvasBase.get_supported_filetypes()
    if kind and kind not in known:
        raise ValueError(f"{path}: a plot is one of {', '.join(known)}, not {kind}")


def write_load_plot(loads: Mapping[int, Mapping[str, torch.Tensor]], path: str | Path) -> None:
    """Draw, for each number of ranks, its ``loads`` [L, ranks] by name: of the first layer, over
    their mean, the busiest rank first. ValueError as ``check_can_draw``."""
    check_can_draw(path)
    from matplotlib.figure import Figure

    size = LOAD_WIDTH * len(loads), LOAD_HEIGHT
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
    for axis, (ranks, found) in zip(axes, loads.items(), strict=True):
        for name, values in found.items():
            first = values[0].double() / values[0].double().mean().clamp_min(1e-30)
            axis.step(range(ranks), first.sort(descending=True).values, label=name, where="mid")
        axis.set(title=f"{ranks} ranks", xlabel="rank, busiest first", yscale="log")
    axes[0].set_ylabel("load / mean")
    axes[0].legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=LOAD_DOTS_PER_INCH)


def write_plot(report: dict[str, Any], path: str | Path) -> None:
    """Draw ``report`` into an image file; ValueError as ``check_can_draw``, or without rows."""
    check_can_draw(path)
    from matplotlib.figure import Figure

    groups = _groups(report["rows"])
    if not groups:
        raise ValueError("the report has no rows to draw")
    figure = Figure(figsize=(WIDTH, HEIGHT_PER_GROUP * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (title, rows), (speed, roof) in zip(groups.items(), axes, strict=True):
        _draw_speed(speed, title, rows)
        _draw_roofline(roof, rows, report)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _groups(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("us"):
            scope = "" if row.get("scope", "layer") == "layer" else f", {row['scope']}"
            found[f"{row['shape']}, {row['format']}, {row['routing']}{scope}"].append(row)
    return dict(found)


def _by_implementation(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["T"]):
        found[row["impl"]].append(row)
    return dict(found)


def _draw_speed(axes: Any, title: str, rows: list[Row]) -> None:
    limits: dict[int, float] = {}
    for name, mine in _by_implementation(rows).items():
        tokens = [row["T"] for row in mine]
        axes.plot(tokens, [1e6 * row["T"] / row["us"] for row in mine], marker="o", label=name)
        limits |= {row["T"]: 1e6 * row["T"] / row["limit_us"] for row in mine if row["limit_us"]}
    if limits:
        axes.plot(sorted(limits), [limits[T] for T in sorted(limits)], "k--", label="limit")
    axes.set(title=title, xlabel="tokens per call", ylabel="tokens per second")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _draw_roofline(axes: Any, rows: list[Row], report: dict[str, Any]) -> None:
    """FLOP per byte against FLOP rate; the roof is min(dense rate, bytes per second * x)."""
    bandwidth, peak = report.get("read_gbs"), _dense_rate(rows[0]["format"], report)
    for name, mine in _by_implementation(rows).items():
        axes.plot(
            [intensity(row) for row in mine], [row["tflops"] for row in mine], "o", label=name
        )
    if bandwidth and peak:
        ridge = peak * 1e3 / bandwidth
        measured = [intensity(row) for row in rows]
        xs = sorted({min(*measured, ridge) / 2, ridge, max(*measured, ridge) * 2})
        axes.plot(xs, [min(peak, x * bandwidth / 1e3) for x in xs], "k--", label="limit")
    axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s", title="roofline")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _dense_rate(format: str, report: dict[str, Any]) -> float | None:
    """TFLOP/s of a large product. Weights in fewer bits are multiplied as the rows' floats, which
    are known where one dtype was measured."""
    rates = {name: rate for name, rate in report.items() if name.endswith("_tflops")}
    only = next(iter(rates.values())) if len(rates) == 1 else None
    return rates.get(f"{format}_tflops", only)


def intensity(row: Row) -> float:
    """FLOP per byte: the picked experts' weights (without scales), the input and the output, once
    each.

    A file that does not say how many experts were picked is read as if all were that could be.
    """
    pairs = row.get("pairs") or row["T"] * row["k"]
    picked = row.get("active_experts") or min(row["E"], row["T"] * row["k"])
    flops = 1e6 * row["us"] * row["tflops"]
    floats = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}.get(row["format"])
    element = floats or format_named(row["format"]).bits / 8
    weights = picked * flops / (2 * pairs)
    return flops / (weights * element + 2 * row["T"] * row["H"] * (floats or 2))
