"""What a table of measurements says of what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

PEER_SHARE = PEER_LIMIT = 0.97
COLUMNS = {"us": "us", "fraction": "fraction_of_limit", "tflops": "tflops"}
"""Where a row has what a target asks, by its kind."""


@dataclass(frozen=True)
class Verdict:
    """One thing asked of one problem. ``detail`` says what was compared."""

    what: str
    shape: str
    routing: str
    T: int
    asked: str
    measured: str
    met: bool
    detail: str = ""
    format: str = "bf16"


def words_of(kind: str, value: float) -> str:
    """What a target asks: ``us`` at most, ``fraction`` (of the limit) or ``tflops`` at least."""
    if kind == "us":
        return f"<= {value:g} us"
    if kind == "fraction":
        return f">= {value:.0%} of limit"
    return f">= {value:g} TFLOP/s"


def is_met(kind: str, value: float, row: Row) -> bool:
    have = row[COLUMNS[kind]]
    return bool(have <= value if kind == "us" else have >= value)


def on_measured_peers(
    row: Row, peers: dict[str, list[float]], tokens: Sequence[int]
) -> list[Verdict]:
    """Against the fastest of ``peers``: by name, microseconds for each of ``tokens``."""
    if not peers or row["T"] not in tokens:
        return []
    times = {name: values[tokens.index(row["T"])] for name, values in peers.items()}
    best = min(times, key=lambda name: times[name])
    share, fraction = row["us"] / times[best], row["fraction_of_limit"]
    asked = f"<= {PEER_SHARE}x of {times[best]:g} us or >= {PEER_LIMIT:.0%} of limit"
    met = share <= PEER_SHARE or fraction >= PEER_LIMIT
    place, measured = (row["shape"], row["routing"], row["T"]), f"{share:.2f}x, {fraction:.1%}"
    fmt = row.get("format", "bf16")
    return [Verdict("measured peers", *place, asked, measured, met, best, fmt)]


def print_verdicts(found: Sequence[Verdict]) -> None:
    for one in found:
        mark = "met   " if one.met else "MISSED"
        print(
            f"{mark} {one.what:14} {one.shape:16} {one.format:12} {one.routing:13} T={one.T:<6} "
            f"{one.measured:>14}  asked {one.asked}  {one.detail}"
        )
    for what in dict.fromkeys(one.what for one in found):
        of_kind = [one for one in found if one.what == what]
        print(f"{what}: {sum(one.met for one in of_kind)} of {len(of_kind)} met")
