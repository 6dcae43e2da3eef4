"""What a table of measurements says of what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
