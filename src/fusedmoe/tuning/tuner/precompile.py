"""Compiling tiles in several processes at once, before they are measured in this one.

What a process compiles, Triton keeps on disk, where the measuring process finds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch

from fusedmoe.tuning.tile_records import Tile
from fusedmoe.tuning.tuner.tunable import Tunable

MAX_PROCESSES = 16
_TILES_PER_TASK = 4


class Compilers:
    """Processes that stay for several layers; each keeps a context on the GPU."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def compile(
        self,
        tunable: Tunable,
        device: torch.device,
        stage: str,
        tiles: Sequence[Tile],
    ) -> dict[Tile, str]:
        """The tiles that cannot be compiled or loaded, each with the reason."""
        parts = [tiles[i : i + _TILES_PER_TASK] for i in range(0, len(tiles), _TILES_PER_TASK)]
        tasks = [self._pool.submit(tunable.compile, device, stage, part) for part in parts]
        refused: dict[Tile, str] = {}
        for task in tasks:
            refused |= task.result()
        return refused


@contextmanager
def compilers(processes: int | None = None) -> Iterator[Compilers]:
    """As many processes as there are cores, up to ``MAX_PROCESSES``."""
    if processes is None:
        processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    # A process that has used the GPU cannot be forked.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield Compilers(pool)
