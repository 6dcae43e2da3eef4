"""The prefill kernels' order of tiles, and their sum, as far as a CPU can run them."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from fusedmoe.kernels.triton import hopper_prefill
from fusedmoe.kernels.triton.hopper_prefill_common import tile_of
from fusedmoe.tuning.hopper_tiles import PrefillTiles, block_of_task

TILES = (
    PrefillTiles(),
    PrefillTiles(spread=2),
    PrefillTiles(spread=4),
    PrefillTiles(spread=16),
    PrefillTiles(group=12, spread=3),
)


def device_tile_of(*arguments: int) -> tuple[int, int]:
    """The body of the kernels' function, on Python's numbers."""
    language = SimpleNamespace(minimum=min, where=lambda chosen, a, b: a if chosen else b)
    return FunctionType(tile_of.fn.__code__, {"gl": language})(*arguments)


@pytest.mark.parametrize("tiles", TILES, ids=lambda tiles: f"{tiles.group}/{tiles.spread}")
@pytest.mark.parametrize("blocks", [0, 1, 15, 16, 17, 33, 64, 130])
@pytest.mark.parametrize("column_tiles", [1, 6])
def test_every_tile_is_one_task(tiles, blocks, column_tiles):
    tasks = range(blocks * column_tiles)
    order = [block_of_task(task, blocks, column_tiles, tiles) for task in tasks]
    device = [device_tile_of(t, blocks, column_tiles, tiles.group, tiles.spread) for t in tasks]
    assert order == device
    assert sorted(order) == [(b, c) for b in range(blocks) for c in range(column_tiles)]


def test_a_group_is_put_together_from_distant_neighbours():
    tiles = PrefillTiles(group=8, spread=2)
    first = [block_of_task(task, 33, 3, tiles)[0] for task in range(8)]
    last = [block_of_task(task, 33, 3, tiles)[0] for task in range(32 * 3, 33 * 3)]
    assert first == [0, 1, 2, 3, 16, 17, 18, 19]
    assert last == [32, 32, 32]


def test_an_expert_with_many_rows_no_longer_fills_whole_groups():
    """Of 64 blocks 32 belong to one expert: half of every group, where groups are mixed."""
    groups = {}
    for spread in (1, 4):
        tiles = PrefillTiles(spread=spread)
        blocks = [block_of_task(task, 64, 1, tiles)[0] for task in range(64)]
        groups[spread] = [
            sum(16 <= block < 48 for block in blocks[first : first + 16])
            for first in range(0, 64, 16)
        ]
    assert groups == {1: [0, 16, 16, 0], 4: [8, 8, 8, 8]}


@pytest.mark.parametrize("bad", [{"spread": 3}, {"spread": 0}, {"sum_spans": 0}])
def test_tiles_that_do_not_divide_are_named(bad):
    with pytest.raises(ValueError, match="groups of 16"):
        PrefillTiles(**bad)


@pytest.mark.parametrize("weighted", [False, True])
def test_wider_programs_add_the_same_bits(weighted):
    """Also where H is no multiple of a pass, some slots are remote, and their rows are NaN."""
    T, K, H, E, local = 5, 3, 2576, 8, 3
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, E + 1, (T, K), dtype=torch.int32, generator=generator)
    expert_map = torch.full((E,), -1, dtype=torch.int32)
    expert_map[2 : 2 + local] = torch.arange(local, dtype=torch.int32)
    live = (ids >= 2) & (ids < 2 + local)
    y = torch.full((T * K + 7, H), float("nan"))
    position = torch.full((T * K,), 2**30, dtype=torch.int32)
    rows = torch.randperm(T * K + 7, generator=generator)[: T * K].to(torch.int32)
    position[live.flatten()] = rows[live.flatten()]
    y[rows[live.flatten()].long()] = torch.randn(int(live.sum()), H, generator=generator)
    weights = torch.rand(T, K, generator=generator) if weighted else None
    sums = []
    for spans in (1, 2, 3, 4):
        out = torch.full((T, H), float("nan"))
        hopper_prefill._sum_rows(
            y, weights, position, ids, expert_map, out, local, PrefillTiles(sum_spans=spans)
        )
        sums.append(out)
    expected = torch.zeros(T, H)
    for t, k in live.nonzero().tolist():
        weight = 1.0 if weights is None else weights[t, k]
        expected[t] += weight * y[position[t * K + k]]
    assert all(out.equal(sums[0]) for out in sums)
    torch.testing.assert_close(sums[0], expected)
