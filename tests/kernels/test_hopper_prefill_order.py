"""Prefill: the order of tiles and the sum, as far as a CPU can run them."""

from __future__ import annotations

from itertools import pairwise
from types import FunctionType, SimpleNamespace

import pytest
import torch

from fusedmoe.kernels.align import align_local_slots
from fusedmoe.kernels.hopper_prefill import PREFILL_BLOCK, prefill_rows
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.tuning.hopper_tiles import PrefillTiles

pytest.importorskip("triton")
from fusedmoe.kernels.triton import hopper_prefill
from fusedmoe.kernels.triton.hopper_common import tile_of, tile_of_run


@pytest.mark.parametrize("blocks", [0, 1, 15, 16, 17, 33, 64, 130])
@pytest.mark.parametrize("column_tiles", [1, 6])
@pytest.mark.parametrize("group", [12, 16])
def test_every_tile_is_one_task(group, blocks, column_tiles):
    run = FunctionType(tile_of.fn.__code__, {"gl": SimpleNamespace(minimum=min)})
    order = [run(task, blocks, column_tiles, group) for task in range(blocks * column_tiles)]
    assert sorted(order) == [(b, c) for b in range(blocks) for c in range(column_tiles)]
    assert all(block // group <= later // group for (block, _), (later, _) in pairwise(order))


class Table:
    """What ``gl.load`` reads from: the numbers and a place in them."""

    def __init__(self, numbers, at=0):
        self.numbers, self.at = numbers, at

    def __add__(self, more):
        return Table(self.numbers, self.at + more)

    def load(self, mask=True, other=0):
        at = torch.as_tensor(self.at)
        found = self.numbers[at.clamp(max=self.numbers.numel() - 1)]
        return torch.where(torch.as_tensor(mask), found, other)


@pytest.mark.parametrize("counts", [[1] * 20, [40], [3, 1, 1, 9, 17, 2], [16, 16, 1], [7, 7, 7]])
@pytest.mark.parametrize("column_tiles", [1, 6])
@pytest.mark.parametrize(("entries", "again"), [(1, False), (2, False), (1, True)])
def test_blocks_of_one_expert_take_turns(counts, column_tiles, entries, again):
    """Every tile is one task, also where experts come ``again``, as those of late rows do; between
    two tiles of the same weights lie, in one group of places, only tiles of those weights. What
    stands behind the last block counts for nothing, nor do entries between the first of blocks."""
    blocks, group = sum(counts), 16
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    runs = experts
    if again:
        experts, runs = torch.cat([experts, experts]), torch.cat([experts, experts + len(counts)])
        blocks *= 2
    table = torch.full(((blocks + group) * entries,), -1)
    table[::entries] = torch.cat([experts, experts[-1:].expand(group)])
    namespace = SimpleNamespace(
        arange=lambda start, end, layout: torch.arange(start, end),
        BlockedLayout=lambda *a: None,
        load=lambda table, **given: table.load(**given),
        num_warps=lambda: 4,
        where=torch.where,
        min=lambda x, axis: x.min(),
        max=lambda x, axis: x.max(),
    )
    run = FunctionType(tile_of_run.fn.__code__, {"gl": namespace})
    order = [
        tuple(int(found) for found in run(task, blocks, Table(table), column_tiles, group, entries))
        for task in range(blocks * column_tiles)
    ]
    assert all(experts[block] == expert for block, _, expert in order)
    tiles = [(block, tile) for block, tile, _ in order]
    assert sorted(tiles) == [(b, c) for b in range(blocks) for c in range(column_tiles)]
    weights = [(block // group, int(runs[block]), tile) for block, tile, _ in order]
    changes = [new for old, new in pairwise(weights) if new != old]
    assert len(changes) + 1 == len(set(weights))


@pytest.mark.parametrize(("E", "H"), [(5, 2576), (8, 2576), (8, 4112)])
@pytest.mark.parametrize("weighted", [False, True])
def test_wider_programs_add_the_same_bits(weighted, E, H):
    """Also where H is no multiple of a pass, some or most slots are remote, and their rows NaN."""
    T, K, local = 5, 3, 3
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
    sums, w2 = [], torch.empty(local, H, 0)
    for passes in ((1024, 1), (1024, 2), (1024, 3), (1024, 4), (2048, 1)):
        out = torch.full((T, H), float("nan"))
        layer = LayerTensors(out, w2, w2, weights, ids, out, y, y, 1, expert_map=expert_map)
        hopper_prefill.sum_rows(layer, position, passes)
        sums.append(out)
    expected = torch.zeros(T, H)
    for t, k in live.nonzero().tolist():
        weight = 1.0 if weights is None else weights[t, k]
        expected[t] += weight * y[position[t * K + k]]
    assert all(out.equal(sums[0]) for out in sums)
    torch.testing.assert_close(sums[0], expected)


def test_a_table_without_room_for_counters_is_refused():
    """Tasks are counted in padding behind the table; without it they would be counted in slots."""
    x, w1, w2 = torch.zeros(6, 16), torch.zeros(2, 32, 16), torch.zeros(2, 16, 16)
    ids = torch.tensor([[0], [1], [0], [1], [0], [1]], dtype=torch.int32)
    tables = align_local_slots(ids, PREFILL_BLOCK, 2, None, whole_blocks=True)
    rows = prefill_rows(6, 2)
    assert tables.sorted_ids.shape == (rows,)
    layer = LayerTensors(
        x, w1, w2, None, ids, torch.zeros(6, 16), torch.zeros(rows, 16), torch.zeros(rows, 16), 132
    )
    with pytest.raises(ValueError, match=f"{rows} slots for {rows} rows"):
        hopper_prefill.prefill_gemms(
            layer, torch.zeros(6, dtype=torch.int32), tables, PrefillTiles()
        )
