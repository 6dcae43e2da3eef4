"""How rows between GPUs are cut: as was fastest where it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusedmoe.tuning.peer_tiles import peer_tiles

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_recorded_times_are_of_the_tiles_that_are_chosen():
    """The number of programs counts only where there are as many tasks."""
    for row in json.loads((RESULTS / "h200-x4" / "all_to_all.json").read_text())["rows"]:
        tiles, T = peer_tiles(row["T"], row["H"]), row["T"]
        assert (tiles.block, tiles.num_warps) == (row["tiles"]["block"], row["tiles"]["num_warps"])
        tasks = T * -(-row["H"] // tiles.block)
        assert min(tasks, tiles.programs) == min(tasks, row["tiles"]["programs"])


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 64, 65, 10_000])
@pytest.mark.parametrize("hidden", [1, 40, 512, 600, 7168])
def test_a_task_is_a_power_of_two_and_hardly_wider_than_a_row(rows, hidden):
    block = peer_tiles(rows, hidden).block
    assert block & (block - 1) == 0
    assert 32 <= block <= max(32, 2 * hidden)
