"""Slots grouped by expert in whole blocks: the table that every grouped GEMM walks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmoe.kernels import align
from fusedmoe.kernels.align import (
    LoneSlots,
    MoEAlignmentWithScatter,
    align_reference,
    moe_align_block_size,
    padded_slots,
)


def triton_align(*arguments):
    from fusedmoe.kernels.triton.align import align

    return align(*arguments)


def both(ids, block_size, groups, expert_map=None, drop_remote=False):
    P = padded_slots(ids.numel(), block_size, groups, False)
    arguments = (ids, block_size, groups, P, expert_map, drop_remote, True)
    return align_reference(*arguments), triton_align(*arguments)


def assert_same(left, right):
    for a, b in zip((*left[0], left[1]), (*right[0], right[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_strided_ids_and_maps_are_read_by_their_values(monkeypatch):
    """Flattened, ids [T, 1] and [1, K] keep their strides, which no kernel asks for."""
    seen = []

    def implementation(ids, *rest):
        seen.append((ids, rest[3]))
        return triton_align(ids, *rest)

    monkeypatch.setattr(align, "align_reference", implementation)
    here = torch.tensor([[1, 7], [0, 7], [-1, 7]], dtype=torch.int32)[:, 0]
    columns = torch.tensor([[0, 2], [1, 2], [2, 0], [1, 0]], dtype=torch.int32)
    one = torch.zeros((), dtype=torch.int32)
    for ids in (columns[:, :1], columns.view(1, 8)[:, ::2], one.expand(6, 1)):
        found = moe_align_block_size(ids, 2, 3, here, ignore_invalid_experts=True)
        expected = align_reference(ids.flatten(), 2, 3, len(found.sorted_ids), here, True, False)
        assert all(map(torch.equal, found, expected[0]))
        lone = LoneSlots.of(ids, here)
        for numbers, mapped in (*seen, lone):
            assert numbers.is_contiguous()
            assert mapped.is_contiguous()
        assert lone.topk_ids.tolist() == ids.flatten().tolist()


def test_the_layout_spelled_out():
    ids = torch.tensor([[2, 0], [2, 3], [0, 2], [-1, 9]], dtype=torch.int32)
    result = moe_align_block_size(ids, 2, 4)
    # expert 0: slots 1, 4; expert 1: none; expert 2: slots 0, 2, 5 and padding; expert 3: slot 3
    assert result.sorted_ids.tolist()[:8] == [1, 4, 0, 2, 5, 8, 3, 8]
    assert result.expert_ids.tolist() == [0, 2, 2, 3, -1, -1]
    assert result.num_tokens_post_pad.tolist() == [8]
    assert result.sorted_ids.shape == (8 + 4 * 1,)
    assert [t.dtype for t in result] == [torch.int32] * 3


def test_remote_experts_keep_blocks_or_are_dropped():
    ids = torch.tensor([[2, 0], [1, 3]])
    expert_map = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    kept = moe_align_block_size(ids, 2, 4, expert_map, return_scatter_idx=True)
    assert isinstance(kept, MoEAlignmentWithScatter)
    assert kept.expert_ids.tolist() == [1, -1, 0, -1]
    assert kept.sorted_ids.tolist() == [1, 4, 2, 4, 0, 4, 3, 4]
    assert kept.scatter_idx.tolist() == [[0], [1], [-1], [-1]]
    dropped = moe_align_block_size(
        ids, 2, 4, expert_map, ignore_invalid_experts=True, num_local_experts=2
    )
    assert dropped.num_tokens_post_pad.tolist() == [4]
    assert dropped.sorted_ids.tolist() == [0, 4, 1, 4, 4, 4]
    assert dropped.expert_ids.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("R", "block_size", "groups", "whole", "expected"),
    [(10, 4, 3, False, 19), (10, 4, 3, True, 20), (2, 4, 3, False, 8), (0, 16, 8, False, 0)],
)
def test_sizes_follow_from_shapes_alone(R, block_size, groups, whole, expected):
    assert padded_slots(R, block_size, groups, whole) == expected
    result = moe_align_block_size(
        torch.zeros(R, 1, dtype=torch.int32), block_size, groups, pad_sorted_ids=whole
    )
    assert result.sorted_ids.shape == (expected,)
    assert result.expert_ids.shape == (-(-expected // block_size),)


ROUTINGS = {
    "none": lambda: torch.empty(0, dtype=torch.int32),
    "one": lambda: torch.tensor([3], dtype=torch.int64),
    "all_on_one_expert": lambda: torch.full((77,), 4, dtype=torch.int32),
    "all_invalid": lambda: torch.tensor([-1, 100, -5, 6], dtype=torch.int32),
    "random": lambda: torch.randint(-1, 7, (301,), dtype=torch.int32),
    "int64_extremes": lambda: torch.tensor([2**40, -(2**40), 2**32 + 1, 1], dtype=torch.int64),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("scheme", ["one_launch", "two_launches", "three_launches"])
@pytest.mark.parametrize("placement", ["all_local", "mapped", "dropped"])
def test_every_device_scheme_agrees_with_the_definition(monkeypatch, routing, scheme, placement):
    if scheme != "one_launch":
        from fusedmoe.kernels.triton import align, align_chunks

        monkeypatch.setattr(align, "ONE_LAUNCH_SLOTS", -1)
        if scheme == "three_launches":
            monkeypatch.setattr(align_chunks, "MOST_COUNTS", -1)
        if routing == "none":
            pytest.skip("no slots never take more than one launch")
    ids = ROUTINGS[routing]()
    expert_map = None
    if placement != "all_local":
        expert_map = torch.tensor([1, -1, 0, 2, -1, 3], dtype=torch.int32)
    assert_same(*both(ids, 8, 6, expert_map, placement == "dropped"))


@pytest.mark.parametrize("R", [2049, 4500, 8192, 8200])
def test_many_slots(R):
    ids = torch.randint(0, 40, (R,), dtype=torch.int32)
    assert_same(*both(ids, 16, 40))


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(-2, 9), max_size=60),
    block_size=st.sampled_from([1, 4, 16]),
    groups=st.integers(1, 8),
)
def test_every_valid_slot_appears_once_in_a_block_of_its_expert(ids, block_size, groups):
    topk_ids = torch.tensor(ids, dtype=torch.int32)[:, None]
    result = moe_align_block_size(topk_ids, block_size, groups)
    used = int(result.num_tokens_post_pad)
    assert used % block_size == 0
    placed = [
        (slot, int(result.expert_ids[at // block_size]))
        for at, slot in enumerate(result.sorted_ids[:used].tolist())
        if slot < len(ids)
    ]
    assert sorted(placed) == [(s, e) for s, e in enumerate(ids) if 0 <= e < groups]
    assert (result.sorted_ids[used:] == len(ids)).all()


def test_strided_ids():
    ids = torch.randint(0, 5, (6, 8))[:, ::2]
    assert_same(
        (moe_align_block_size(ids, 4, 5), None),
        (moe_align_block_size(ids.contiguous(), 4, 5), None),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(2, 2), 16, 4),
        (torch.zeros(2, 2, dtype=torch.int32), 0, 4),
        (torch.zeros(2, 2, dtype=torch.int32), 16, 0),
        (torch.zeros(2, 2, dtype=torch.int32), 16, 4, torch.zeros(2, 2, dtype=torch.int32)),
        (torch.zeros(1, dtype=torch.int32).expand(2**27, 1), 16, 2**28),
    ],
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=r"got|pass"):
        moe_align_block_size(*arguments)


@pytest.mark.parametrize("R", [3, 5000])
def test_spare_slots_are_padding(R):
    ids = torch.arange(R, dtype=torch.int32)[:, None] % 2
    plain = moe_align_block_size(ids, 4, 2, pad_sorted_ids=True)
    spare = moe_align_block_size(ids, 4, 2, pad_sorted_ids=True, spare_slots=8)
    assert spare.sorted_ids.tolist() == plain.sorted_ids.tolist() + 8 * [R]
    assert spare.expert_ids.tolist() == plain.expert_ids.tolist() + 2 * [-1]
    assert spare.num_tokens_post_pad.equal(plain.num_tokens_post_pad)
