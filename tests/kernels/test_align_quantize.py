"""One launch that sorts slots and rounds rows does what the two do apart."""

import pytest
import torch

from fusedmoe.kernels.align import MoEAlignment, align_reference, padded_slots
from fusedmoe.kernels.align_quantize import align_and_quantize
from fusedmoe.kernels.quantize import STORED, quantize_rows_reference
from fusedmoe.kernels.triton.align_quantize import align_and_quantize as launch
from fusedmoe.kernels.triton.quantize import quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_128_UE8M0,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
)

KEYS = [FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0, FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN]
KEYS += [FP8_STATIC_TENSOR]
EXPERTS, BLOCK = 6, 8


def problem(T=5, K=3, D=200):
    torch.manual_seed(0)
    ids = torch.randint(-1, EXPERTS + 1, (T, K), dtype=torch.int32)
    return ids, torch.randn(T, D)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_launch_is_both(key, mapped):
    ids, x = problem()
    expert_map = torch.tensor([1, -1, 0, -1, 2, -1], dtype=torch.int32) if mapped else None
    groups = 3 if mapped else EXPERTS
    (T, K), D = ids.shape, x.shape[1]
    P = padded_slots(T * K, BLOCK, groups, False)
    tables = MoEAlignment(
        *(torch.full((size,), -7, dtype=torch.int32) for size in (P, -(-P // BLOCK), 1))
    )
    group = -1 if key.static else max(key.group_shape.col, 0)
    q = torch.empty(T, D, dtype=STORED[key.dtype])
    scale = torch.full((T, -(-D // group) if group > 0 else 1), float("nan"))
    if key.static:
        scale = torch.full((1,), 0.02)
    largest = torch.full((T, K), 5, dtype=torch.int32)
    launch(
        ids, tables, BLOCK, groups, expert_map, x, q, scale, group, key.scale_kind == "e8m0",
        largest,
    )  # fmt: skip
    expected, _ = align_reference(ids.flatten(), BLOCK, groups, P, expert_map, mapped, False)
    for found, right in zip(tables, expected, strict=True):
        assert found.equal(right)
    alone, alone_scale = torch.empty_like(q), scale.clone()
    quantize(x, alone, alone_scale, group or None, key.scale_kind == "e8m0", key.static)
    assert scale.equal(alone_scale)
    assert q.view(torch.uint8).equal(alone.view(torch.uint8))
    assert not largest.any()


@pytest.mark.parametrize("with_largest", [False, True])
@pytest.mark.parametrize("key", [*KEYS, FP8_DYNAMIC_TENSOR], ids=str)
def test_elsewhere_they_are_two_launches(key, with_largest):
    ids, x = problem()
    scale = torch.full((1,), 0.1) if key.static else None
    found = align_and_quantize(ids, BLOCK, None, EXPERTS, x, key, scale, with_largest=with_largest)
    rows = quantize_rows_reference(x, key, scale)
    assert found.rows.data.view(torch.uint8).equal(rows.data.view(torch.uint8))
    assert found.rows.scale.equal(rows.scale)
    assert found.alignment.sorted_ids.numel() == padded_slots(ids.numel(), BLOCK, EXPERTS, False)
    assert (found.largest is not None) == with_largest
    assert not with_largest or (found.largest.shape == ids.shape and not found.largest.any())
