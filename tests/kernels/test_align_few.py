"""Tables of few slots by one program, its text compiled for the CPU where there is no GPU."""

from __future__ import annotations

import shutil

import pytest
import torch

from cuda_on_cpu import KernelOnCpu
from fusedmoe.kernels.align import align_reference, moe_align_block_size, padded_slots
from fusedmoe.kernels.cuda import align_few

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and shutil.which("g++") is None, reason="compiles with g++"
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    def kernel(defines, threads, shared):
        given = align_few.SOURCES, "align_few", defines.items(), threads, shared
        return KernelOnCpu(*given)

    if DEVICE == "cpu":
        monkeypatch.setattr(align_few, "_kernel", kernel)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kinds: empty(*sizes, **kinds).fill_(12345))
    align_few._kernel_of.cache_clear()


# ids, groups, slots of a block
CASES = {
    "none": (torch.empty(0, dtype=torch.int32), 5, 8),
    "one": (torch.tensor([3]), 6, 8),
    "all_on_one_expert": (torch.full((77,), 4, dtype=torch.int32), 6, 8),
    "all_invalid": (torch.tensor([-1, 100, -5, 6], dtype=torch.int32), 6, 8),
    "int64_extremes": (torch.tensor([2**40, -(2**40), 2**32 + 1, 1]), 6, 8),
    "blocks_of_one": (torch.randint(-1, 7, (60,), dtype=torch.int32), 6, 1),
    "more_groups_than_threads": (torch.randint(-1, 301, (128,), dtype=torch.int32), 300, 8),
    "some": (torch.randint(-1, 42, (301,), dtype=torch.int32), 40, 24),
    "as_many_as_there_are_words_for": (torch.randint(0, 9, (512,), dtype=torch.int32), 9, 16),
    "blocks_of_32": (torch.randint(-1, 42, (130,), dtype=torch.int32), 40, 32),
}


@pytest.mark.parametrize("spare", [0, 3, 70])
@pytest.mark.parametrize("name", CASES)
def test_tables_are_those_of_the_definition(name, spare, monkeypatch):
    if name == "more_groups_than_threads":
        monkeypatch.setattr(align_few, "WIDTH", 64)
    ids, groups, block_size = CASES[name]
    maps = [None, torch.full((groups,), -1, dtype=torch.int32)]
    maps[1][::2] = torch.arange(-(-groups // 2), dtype=torch.int32).flip(0)
    for expert_map in maps:
        own = groups if expert_map is None else -(-groups // 2)
        P = padded_slots(ids.numel(), block_size, own, False) + spare
        given = ids, block_size, own, P, expert_map
        on_device = (one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in given)
        found = align_few.align_few(*on_device)
        expected, _ = align_reference(*given, True, False)
        for one, other in zip(found, expected, strict=True):
            assert one.cpu().equal(other)


def test_slots_or_groups_without_room_are_left_to_others():
    many = torch.zeros(align_few.WORDS[-1] * 32 + 1, dtype=torch.int32, device=DEVICE)
    assert align_few.align_few(many, 8, 4, many.numel() + 28, None) is None
    few = many[:-1]
    assert align_few.align_few(few, 8, 4096, 8 * few.numel(), None) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("R", [64, 512, 513])
def test_launched_where_it_has_room(R, monkeypatch):
    launched, own = [], align_few.align_few
    monkeypatch.setattr(align_few, "align_few", lambda *a: launched.append(own(*a)) or launched[-1])
    ids = torch.randint(-1, 129, (R, 1), dtype=torch.int32, device="cuda")
    found = moe_align_block_size(ids, 8, 128)
    if torch.cuda.get_device_capability()[0] == 9:
        assert [one is not None for one in launched] == [R <= 512]
    expected, _ = align_reference(
        ids.cpu().flatten(), 8, 128, found.sorted_ids.numel(), None, True, False
    )
    for one, other in zip(found, expected, strict=True):
        assert one.cpu().equal(other)
    launched.clear()
    moe_align_block_size(ids, 8, 128, return_scatter_idx=True)
    assert not launched
