"""Prefill: the order of tiles, the pieces of the last ones and the sum, as far as a CPU can run
them."""

from __future__ import annotations

from itertools import pairwise
from types import FunctionType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from fusedmoe.kernels.triton import hopper_prefill
from fusedmoe.kernels.triton.hopper_prefill_common import piece_of, plan_of, tile_of
from fusedmoe.tuning.hopper_tiles import LEAST_STEPS, flag_slots, pieces


def pieces_of_program(me: int, programs: int, tasks: int, steps: int, parts: int):
    """The bodies of the kernels' functions, on Python's numbers: [(task, begin, end)]."""
    language = SimpleNamespace(
        minimum=min,
        maximum=max,
        where=lambda chosen, a, b: a if chosen else b,
        program_id=lambda axis: me,
        num_programs=lambda axis: programs,
    )
    plan = FunctionType(plan_of.fn.__code__, {"gl": language, "HANDING_ON": 4})(tasks, steps, parts)
    run = FunctionType(piece_of.fn.__code__, {"gl": language})
    return [run(index, plan, steps) for index in range(plan[0])]


SIZES = [
    (tasks, steps, parts)
    for tasks in (0, 1, 5, 131, 132, 133, 136, 190, 200, 240, 262, 264, 265, 500, 1280, 4096)
    for steps in (1, 12, 32, 45)
    for parts in (1, 2, 4)
]


@pytest.mark.parametrize(("tasks", "steps", "parts"), SIZES)
def test_every_step_is_done_once_and_in_order(tasks, steps, parts):
    """Pieces of a task follow each other: from one program to the next, and in time, if all tasks
    take equally long. Nobody waits for a program behind it, so that not all have to run at once."""
    programs = 132
    parts = pieces(64 * steps, 64, parts)
    found: dict[int, list[tuple[int, int, int, int]]] = {}
    share = []
    for me in range(programs):
        done = 0
        for task, begin, end in pieces_of_program(me, programs, tasks, steps, parts):
            assert 0 <= begin < end <= steps
            found.setdefault(task, []).append((begin, end, me, done))
            done += end - begin
        share.append(done)
    assert sorted(found) == list(range(tasks))
    for task, ones in found.items():
        ones.sort()
        assert ones[0][0] == 0
        assert ones[-1][1] == steps
        assert len(ones) <= parts + 1
        for (_, end, owner, start), (begin, _, me, later) in pairwise(ones):
            assert end == begin
            assert me == owner + 1, task
            if tasks >= 3 * programs:
                assert start + end - begin <= later or start < later
    whole = -(-tasks // programs) * steps
    assert max(share) <= whole


@pytest.mark.parametrize(
    ("tasks", "steps", "most"),
    [(320, 128, 2.45), (4096, 80, 31.3), (3072, 32, 23.3), (1024, 24, 7.8), (1024, 12, 8)],
)
def test_the_last_round_costs_what_it_holds(tasks, steps, most):
    shares = [
        sum(end - begin for _, begin, end in pieces_of_program(me, 132, tasks, steps, 4))
        for me in range(132)
    ]
    assert max(shares) / steps <= most


def test_short_tiles_are_not_cut():
    assert pieces(64 * (2 * LEAST_STEPS - 1), 64, 4) == 1
    assert pieces(64 * 2 * LEAST_STEPS, 64, 4) == 2
    assert pieces(4096, 64, 4) == 4
    assert flag_slots(132) % 128 == 0
    assert flag_slots(132) >= 4 * 132


@pytest.mark.parametrize("blocks", [0, 1, 15, 16, 17, 33, 64, 130])
@pytest.mark.parametrize("column_tiles", [1, 6])
@pytest.mark.parametrize("group", [12, 16])
def test_every_tile_is_one_task(group, blocks, column_tiles):
    run = FunctionType(tile_of.fn.__code__, {"gl": SimpleNamespace(minimum=min)})
    order = [run(task, blocks, column_tiles, group) for task in range(blocks * column_tiles)]
    assert sorted(order) == [(b, c) for b in range(blocks) for c in range(column_tiles)]
    assert all(block // group <= later // group for (block, _), (later, _) in pairwise(order))


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
    sums = []
    for spans in (1, 2, 3, 4):
        out = torch.full((T, H), float("nan"))
        hopper_prefill.sum_rows(y, weights, position, ids, expert_map, out, local, spans)
        sums.append(out)
    expected = torch.zeros(T, H)
    for t, k in live.nonzero().tolist():
        weight = 1.0 if weights is None else weights[t, k]
        expected[t] += weight * y[position[t * K + k]]
    assert all(out.equal(sums[0]) for out in sums)
    torch.testing.assert_close(sums[0], expected)
