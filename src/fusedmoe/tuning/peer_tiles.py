"""How the rows of a dispatch or a combine between GPUs are cut into tasks: pure functions."""

from __future__ import annotations

from typing import NamedTuple


class PeerTiles(NamedTuple):
    """A task is ``block`` columns (a power of two) of one row; ``programs`` share the tasks."""

    programs: int
    block: int
    num_warps: int


def dispatch_tiles(rows: int, hidden: int) -> PeerTiles:
    """For sending ``rows`` rows of ``hidden`` columns."""
    return _tiles(rows, hidden)


def combine_tiles(rows: int, hidden: int) -> PeerTiles:
    """For adding up the sums of ``rows`` rows of ``hidden`` columns."""
    return _tiles(rows, hidden)


def _tiles(rows: int, hidden: int) -> PeerTiles:
    """Whole rows where there are many, so that a program has all of one on its way at once."""
    widest = 1024 if rows < 16 else 8192
    block = min(widest, max(32, 1 << (hidden - 1).bit_length()))
    return PeerTiles(264, block, 8 if block > 2048 else 4)
