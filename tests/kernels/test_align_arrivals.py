"""Blocks of rows that are here stand first, so that products begin before all rows are here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmoe.kernels.align import align_local_slots, padded_slots
from fusedmoe.kernels.align_arrivals import align_arrivals, align_arrivals_reference
from fusedmoe.kernels.peer_layout import LateRows, PeerLayout, PeerView

pytest.importorskip("triton")
from fusedmoe.kernels.triton.align_arrivals import align_arrivals as align_on_device


def both(ids, world, me, block_size, local, expert_map, device="cpu"):
    """Tables and early blocks, by the definition and by the kernels."""
    P = padded_slots(ids.numel(), block_size, local, True) + 64
    arguments = (*(ids.flatten(), ids.numel() // world, me, block_size, local, P, expert_map),)
    onto = [one.to(device) if isinstance(one, torch.Tensor) else one for one in arguments]
    return align_arrivals_reference(*arguments), align_on_device(*onto)


def assert_same(left, right):
    for a, b in zip((*left[0], left[1]), (*right[0], right[1]), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0)


def map_of(rank, world, local):
    found = torch.full((world * local,), -1, dtype=torch.int32)
    found[rank * local : (rank + 1) * local] = torch.arange(local, dtype=torch.int32)
    return found


@settings(max_examples=25)
@given(
    world=st.sampled_from([1, 2, 4, 8]),
    rows=st.integers(1, 90),
    picks=st.integers(1, 5),
    local=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_kernels_follow_the_definition(world, rows, picks, local, seed):
    """Ids out of range and -1 among them; ranks beyond some have no tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, world * local + 1, (world * rows, picks), generator=generator)
    ids[int(torch.randint(0, world * rows + 1, (), generator=generator)) :] = -1
    me = seed % world
    assert_same(*both(ids, world, me, 16, local, map_of(me, world, local)))


@pytest.mark.parametrize("everything_to", [0, 3, None])
def test_all_slots_to_one_expert_or_to_none(everything_to):
    ids = torch.full((4 * 40, 2), -1 if everything_to is None else everything_to)
    assert_same(*both(ids, 4, 0, 16, 4, map_of(0, 4, 4)))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "picks", "local"), [(1024, 8, 32), (513, 6, 64), (1, 8, 4)])
def test_large_batches_on_a_gpu(rows, picks, local):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(-1, 4 * local, (4 * rows, picks), generator=generator).int()
    assert_same(*both(ids, 4, 2, 128, local, map_of(2, 4, local), "cuda"))


def test_early_blocks_hold_own_rows_alone():
    """Every slot of a local expert stands in one block of that expert, of which there are no more
    than without an order."""
    world, rows, picks, local, me = 4, 50, 3, 2, 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, world * local, (world * rows, picks), generator=generator)
    (table, expert_ids, used), early = both(ids, world, me, 16, local, map_of(me, 4, local))[1]
    assert 0 < int(early) < int(used) // 16
    seen = []
    for block, expert in enumerate(expert_ids.tolist()):
        slots = [s for s in table[block * 16 : block * 16 + 16].tolist() if s < ids.numel()]
        seen += slots
        assert all(ids.flatten()[s] == me * local + expert for s in slots)
        owners = {s // (rows * picks) for s in slots}
        assert (owners <= {me}) == (block < int(early) or not slots)
    here = map_of(me, world, local)[ids.flatten()] >= 0
    assert sorted(seen) == here.nonzero()[:, 0].tolist()
    plain = align_local_slots(ids, 16, local, map_of(me, world, local))
    assert int(plain.num_tokens_post_pad) == int(used)


def test_what_a_kernel_waits_with():
    layout = PeerLayout(4, 100, 8, 2, torch.float32)
    view = PeerView(layout, 2, *(torch.zeros(layout.nbytes, dtype=torch.uint8),) * 4)
    x = LateRows.over(torch.zeros(400, 8), view, 7, None)
    ids = torch.arange(800).view(400, 2) % 8
    tables, arrivals = align_arrivals(ids, 16, 2, map_of(2, 4, 2), x, spare_slots=32)
    assert arrivals.rows is x
    assert int(arrivals.early) == 2  # 25 own slots of each of two experts
    assert [one.numel() for one in arrivals.tensors] == [1, 4, layout.nbytes, layout.nbytes]
    assert (tables.sorted_ids[-32:] == 800).all()
