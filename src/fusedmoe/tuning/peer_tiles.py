"""How the rows of a dispatch or a combine between GPUs are cut into tasks: pure functions."""

from __future__ import annotations

from typing import NamedTuple


class PeerTiles(NamedTuple):
    """A task is ``block`` columns (a power of two) of one row; ``programs`` share the tasks."""

    programs: int
    block: int
    num_warps: int

    def grid(self, tasks: int) -> tuple[int, int]:
        """The grid for so many tasks; at least one program, which tells the other ranks."""
        return max(1, min(tasks, self.programs)), 1


# (the most rows, columns of a task, warps of a program)
_BY_ROWS = ((8, 512, 4), (64, 1024, 4))
_BEYOND = (2048, 8)
_PROGRAMS = 264
_LOCAL_PROGRAMS = 2112
_PICKS_PROGRAMS = 8448


def peer_tiles(rows: int, hidden: int) -> PeerTiles:
    """Tiles for sending, or for adding up, ``rows`` rows of ``hidden`` columns.

    Few rows need many programs to be on their way at once; with many rows, wide tasks keep enough
    bytes in flight. Measured on four H200s with 7168 columns and 1, 16, 128, 1024 and 4096 rows.
    """
    wide, num_warps = next((tile for most, *tile in _BY_ROWS if rows <= most), _BEYOND)
    return PeerTiles(_PROGRAMS, _columns(hidden, wide), num_warps)


def local_tiles(hidden: int) -> PeerTiles:
    """For rows that are rounded here for others to fetch. There is no wire to wait for, and many
    programs keep the memory busy."""
    return PeerTiles(_LOCAL_PROGRAMS, _columns(hidden, 1024), 4)


def adding_tiles(hidden: int) -> PeerTiles:
    """Tiles for rows that are added up once all have come."""
    return PeerTiles(_LOCAL_PROGRAMS, _columns(hidden, 4096), 8)


def picks_tiles(hidden: int) -> PeerTiles:
    """For rows of picks that are weighted and added up once all have come. A thread has all picks
    of its columns, 8 at once: so their order is that of other sums, and the bits are the same."""
    block = _columns(hidden, 1024)
    return PeerTiles(_PICKS_PROGRAMS, block, 2 if block >= 512 else 1)


def sum_tile(hidden: int) -> tuple[int, int]:
    """Columns (a power of two) of one token that a program sums and sends, and its warps."""
    return _columns(hidden, 1024), 2


def _columns(hidden: int, most: int) -> int:
    """A power of two of at least 32, at most ``most``, that is not far above ``hidden``."""
    return max(32, min(most, 1 << (hidden - 1).bit_length()))
