"""The picture of how much each rank has to do, before and after balancing. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fusedmoe.cli.plot import check_can_draw

WIDTH_PER_COUNT, HEIGHT, DOTS_PER_INCH = 4.0, 3.2, 110


def write_load_plot(loads: Mapping[int, Mapping[str, torch.Tensor]], path: str | Path) -> None:
    """Draw, for each number of ranks, its ``loads`` [L, ranks] by name: of the first layer, over
    their mean, the busiest rank first. ValueError as ``check_can_draw``."""
    check_can_draw(path)
    from matplotlib.figure import Figure

    size = WIDTH_PER_COUNT * len(loads), HEIGHT
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
    figure.savefig(path, dpi=DOTS_PER_INCH)
