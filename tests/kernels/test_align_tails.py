"""Slots by expert in large blocks with tails behind them: the kernel against the definition, and
the definition against what it promises."""

import pytest
import torch

from fusedmoe.kernels.align_tails import (
    LARGE,
    SMALL,
    align_with_tails,
    align_with_tails_reference,
    tails_rows,
)

pytest.importorskip("triton")
from fusedmoe.kernels.triton.align_tails import align

COUNTS = {
    "nothing": (0, 0, 0),
    "tails alone": (1, SMALL, 77),
    "large alone": (LARGE, SMALL + 1, LARGE - 1),
    "both": (LARGE + 1, 2 * LARGE + SMALL, 0, SMALL + 1, 3 * LARGE, 5),
    "one has all": (0, 0, 1500, 0),
}


def ids_of(counts, stray=0):
    """Slots of these many experts in a random order, and ``stray`` ones without an expert."""
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = torch.cat([ids, torch.full((stray,), -1)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].int()


@pytest.mark.parametrize("name", COUNTS)
def test_every_slot_stands_once_in_a_block_of_its_expert(name):
    counts = COUNTS[name]
    ids = ids_of(counts, stray=3)
    tables = align_with_tails(ids.view(-1, 1), len(counts), None, spare_slots=4)
    large, used = tables.num_tokens_post_pad.tolist()
    assert large % LARGE == 0
    assert used % SMALL == 0
    assert used <= tails_rows(len(ids), len(counts)) == tables.sorted_ids.numel() - 4
    live = tables.sorted_ids < len(ids)
    assert not live[used:].any()
    assert tables.sorted_ids[live].sort().values.tolist() == (ids >= 0).nonzero()[:, 0].tolist()
    of_place = tables.expert_ids.repeat_interleave(SMALL)[: live.numel()]
    assert of_place[live].equal(ids[tables.sorted_ids[live].long()])
    assert (tables.expert_ids[: used // SMALL] >= 0).all()
    assert (tables.expert_ids[used // SMALL :] == -1).all()
    for first in range(0, large, LARGE):  # more would have fitted a small block
        assert live[first : first + SMALL + 1].all()


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "nothing"])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_kernel_is_as_defined(name, mapped):
    counts = COUNTS[name]
    ids = ids_of(counts, stray=3)
    groups, expert_map = len(counts), None
    if mapped:
        expert_map = torch.arange(groups, dtype=torch.int32).flip(0)
        expert_map[0], groups = -1, groups - 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    P = tails_rows(len(ids), groups) + 128
    expected = align_with_tails_reference(ids, groups, P, expert_map)
    there = None if expert_map is None else expert_map.to(device)
    for found, wanted in zip(align(ids.to(device), groups, P, there), expected, strict=True):
        assert found.cpu().equal(wanted)


def test_what_is_refused():
    with pytest.raises(ValueError, match="float32"):
        align_with_tails(torch.zeros(4, 1), 2, None)
