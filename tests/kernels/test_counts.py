"""Rows per expert, local ids, and the blocks of a batched layout."""

import pytest
import torch

from fusedmoe.kernels.align import MAX_SLOTS
from fusedmoe.kernels.counts import (
    batched_align_reference,
    batched_moe_align_block_size,
    count_expert_num_tokens,
    remap_reference,
    remap_topk_to_local,
)


def triton_bodies():
    from fusedmoe.kernels.triton import counts

    return counts


MAP = torch.tensor([1, -1, 0, 2, -1, 9], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("expert_map", [None, MAP])
@pytest.mark.parametrize("R", [0, 1, 50, 5000])
def test_counts(R, expert_map, dtype):
    ids = torch.randint(-2, 8, (R,), dtype=dtype)
    counts = count_expert_num_tokens(ids, 3, expert_map)
    local = [i if expert_map is None else (int(MAP[i]) if 0 <= i < 6 else -1) for i in ids.tolist()]
    assert counts.tolist() == [local.count(e) for e in range(3)]
    assert counts.dtype == torch.int32
    assert triton_bodies().count(ids, 3, expert_map).equal(counts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_remap(dtype):
    ids = torch.tensor([[0, 1, 2], [-1, 6, 5], [3, -9, 4]], dtype=dtype)
    local = remap_topk_to_local(ids, MAP)
    assert local.tolist() == [[1, -1, 0], [-1, -1, 9], [2, -1, -1]]
    assert local.dtype == dtype
    for given in (ids, ids.t().contiguous().t(), ids[:0]):
        assert triton_bodies().remap(given, MAP).equal(remap_reference(given, MAP))


def test_the_batched_layout_spelled_out():
    counts = torch.tensor([3, 0, 2], dtype=torch.int32)
    blocks = batched_moe_align_block_size(4, 2, counts)
    # expert 0 has rows 0, 1, 2 of its four, expert 2 rows 8, 9; 12 is padding
    assert blocks.sorted_ids.tolist() == [0, 1, 2, 12, 8, 9] + [12] * 6
    assert blocks.expert_ids.tolist() == [0, 0, 2, -1, -1, -1]
    assert blocks.num_tokens_post_pad.tolist() == [6]


@pytest.mark.parametrize("counts", [[0], [5], [7, 0, 3, 7, 1], [0, 0, 0], [99, -4, 2], [300, 200]])
@pytest.mark.parametrize(("max_tokens", "block_size"), [(7, 4), (7, 16), (0, 4), (300, 16)])
def test_batched_blocks(counts, max_tokens, block_size):
    counts = torch.tensor(counts, dtype=torch.int32)
    P = counts.numel() * -(-max_tokens // block_size) * block_size
    arguments = max_tokens, block_size, counts, P
    left, right = batched_align_reference(*arguments), triton_bodies().batched_align(*arguments)
    assert all(a.equal(b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (count_expert_num_tokens, (torch.zeros(3), 4)),
        (count_expert_num_tokens, (torch.zeros(3, dtype=torch.int32), 0)),
        (remap_topk_to_local, (torch.zeros(3), MAP)),
        (batched_moe_align_block_size, (4, 0, torch.zeros(3, dtype=torch.int32))),
        (batched_moe_align_block_size, (-1, 4, torch.zeros(3, dtype=torch.int32))),
        (batched_moe_align_block_size, (MAX_SLOTS, 4, torch.zeros(3, dtype=torch.int32))),
    ],
)
def test_bad_arguments_are_named(function, arguments):
    with pytest.raises(ValueError, match=r"\d"):
        function(*arguments)
