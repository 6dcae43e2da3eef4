"""Prefill: the order of tiles, weights asked ahead and the sum, as far as a CPU can run them."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from fusedmoe.kernels.triton import hopper_prefill
from fusedmoe.kernels.triton.hopper_common import ask_ahead, ask_weights
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


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"spread": 3}, "groups of 16"),
        ({"spread": 0}, "from 0 places"),
        ({"sum_spans": 0}, "0 spans"),
        ({"ahead": 96}, "multiple of 64"),
        ({"ahead": -64}, "-64 columns"),
    ],
)
def test_tiles_that_do_not_divide_are_named(bad, what):
    with pytest.raises(ValueError, match=what):
        PrefillTiles(**bad)


class Asked:
    """The bodies of ``ask_weights`` and ``ask_ahead`` on torch's numbers; counts what they ask
    for, element by element, of a matrix [rows, width] of 2-byte words at address 0."""

    def __init__(self, rows: int, width: int, warps: int) -> None:
        self.rows, self.width = rows, width
        self.counts = torch.zeros(rows * width, dtype=torch.int64)

        def tensors(function):
            return lambda *given: function(*map(torch.as_tensor, given))

        language = SimpleNamespace(
            num_warps=lambda: warps,
            BlockedLayout=lambda *given: None,
            static_range=range,
            arange=lambda first, last, layout: torch.arange(first, last),
            minimum=tensors(torch.minimum),
            where=tensors(torch.where),
            int64=torch.int64,
        )
        known = {"gl": language, "ask_for": self.ask_for}
        known["ask_weights"] = FunctionType(ask_weights.fn.__code__, known)
        self.ask_ahead = FunctionType(ask_ahead.fn.__code__, known)

    def ask_for(self, address: torch.Tensor, size: torch.Tensor) -> None:
        assert (size % 16 == 0).all()
        for first, words in zip(address.tolist(), (size // 2).tolist(), strict=True):
            if words > 0:
                assert first >= 0
                assert first % 8 == 0
                assert first + words <= self.counts.numel()
                self.counts[first : first + words] += 1


@pytest.mark.parametrize("loaded", [64, 128, 256])
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize(("ask", "step"), [(64, 64), (256, 128)])
@pytest.mark.parametrize("kind", ["gate_then_up", "interleaved", "no_gate", "down"])
def test_a_tile_asks_for_its_own_weights_once(kind, ask, step, warps, loaded):
    """Each of ``loaded`` rows, every column once; the last tile reaches past the matrix."""
    e, I, width = 2, 208, 272  # noqa: E741
    gated = kind in ("gate_then_up", "interleaved")
    rows = e * I * (2 if gated else 1)
    tile_rows, expert_rows = (loaded // 2, 2 * I) if kind == "gate_then_up" else (loaded, rows // e)
    for expert, tile in ((0, 0), (1, 0), (1, -(-expert_rows // (2 * tile_rows)))):
        first = expert * expert_rows + tile * tile_rows
        asked = Asked(rows, width, warps)
        jump = I - loaded // 2 if kind == "gate_then_up" else 0
        for k in range(0, width, step):
            asked.ask_ahead(0, first, jump, rows, k, width, ask, loaded)
        wanted = set(range(first, first + loaded))
        if kind == "gate_then_up":
            wanted = {first + row + add for row in range(loaded // 2) for add in (0, I)}
        expected = torch.zeros(rows, dtype=torch.int64)
        expected[[row for row in wanted if row < rows]] = 1
        assert asked.counts.view(rows, width).equal(expected[:, None].expand(rows, width))


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
