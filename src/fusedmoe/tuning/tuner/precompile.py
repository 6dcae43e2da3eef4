"""Compiling tiles in several processes at once, before they are measured in this one.

What a process compiles, Triton keeps on disk, where the measuring process finds it. Compiling means
launching on no rows: the same types, strides and constants as later, and nothing to compute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch

from fusedmoe.bench.problems import Weights
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.tuning.tiles import TileConfig, slots_are_alone
from fusedmoe.tuning.tuner.gemms import run_gemm

MAX_PROCESSES = 16
_TILES_PER_TASK = 4


class Compilers:
    """Processes that stay for several layers; each keeps a context on the GPU."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def compile(
        self,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        stage: str,
        tiles: Sequence[TileConfig],
    ) -> dict[TileConfig, str]:
        """The tiles that cannot be compiled or loaded, each with the reason."""
        parts = [tiles[i : i + _TILES_PER_TASK] for i in range(0, len(tiles), _TILES_PER_TASK)]
        tasks = [
            self._pool.submit(compile_tiles, shape, dtype, device, stage, part) for part in parts
        ]
        refused: dict[TileConfig, str] = {}
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


def compile_tiles(
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
    stage: str,
    tiles: Sequence[TileConfig],
) -> dict[TileConfig, str]:
    """As ``Compilers.compile``, here and now."""

    def one_expert(rows: int, columns: int) -> torch.Tensor:
        storage = torch.empty(rows, columns, dtype=dtype, device=device)
        return storage.expand(shape.E, rows, columns)

    def biases(rows: int) -> torch.Tensor | None:
        return torch.empty(shape.E, rows, dtype=dtype, device=device) if shape.bias else None

    gated = 2 * shape.I
    weights = Weights(
        one_expert(gated, shape.H), one_expert(shape.H, shape.I), biases(gated), biases(shape.H)
    )
    x = torch.empty(1, shape.H, dtype=dtype, device=device)
    act = torch.empty(shape.k, shape.I, dtype=dtype, device=device)
    rows = torch.empty(shape.k, shape.H, dtype=dtype, device=device)
    a, c = (x, act) if stage == "gemm1" else (act, rows)
    refused: dict[TileConfig, str] = {}
    for tile in tiles:
        try:
            for blocks in nothing_to_do(shape, tile, device):
                run_gemm(shape, stage, tile, weights, a, c, blocks)
        except Exception as error:
            if not is_refusal(error):
                raise
            refused[tile] = str(error).splitlines()[0]
    return refused


def nothing_to_do(
    shape: LayerShape, tile: TileConfig, device: torch.device
) -> Iterator[MoEAlignment | LoneSlots]:
    """Blocks without a slot, of each kind that the layer may come to with this tile."""

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    yield MoEAlignment(numbers(*[shape.k] * tile.block_m), numbers(-1), numbers(0))
    if slots_are_alone(shape.k, shape.E) and tile.block_m < 64:
        yield LoneSlots(numbers(*[-1] * shape.k))


def is_refusal(error: Exception) -> bool:
    """Whether Triton says that it cannot run this tile here, and nothing worse happened."""
    return type(error).__module__.partition(".")[0] == "triton"
