"""The four ways to weight and sum over K: same sums, dead slots never read, output in place."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.topk_weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNaiveBatched,
    TopKWeightAndReduceNoOP,
)

T, K, H, e = 5, 3, 4, 4
IDS = torch.tensor([[0, 1, 2], [3, -1, 0], [-1, -1, -1], [2, 0, 3], [1, 3, 2]], dtype=torch.int32)
WEIGHTS = torch.rand(T, K, generator=torch.Generator().manual_seed(0)) * (IDS >= 0)


def slots(dtype=torch.float32) -> torch.Tensor:
    """[T, K, H]; the rows of dead slots were never written."""
    rows = torch.randn(T, K, H, generator=torch.Generator().manual_seed(1))
    return rows.masked_fill((IDS < 0)[..., None], float("nan")).to(dtype)


def expected(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (rows.double().nan_to_num() * weights.double()[..., None]).sum(1)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_contiguous_weights_and_sums_live_slots(on_input, flat, given):
    rows = slots()
    output = torch.full((T, H), float("nan")) if given else None
    result = TopKWeightAndReduceContiguous().apply(
        output, rows.flatten(0, 1) if flat else rows, WEIGHTS, IDS, on_input
    )
    weights = (IDS >= 0).float() if on_input else WEIGHTS
    torch.testing.assert_close(result.double(), expected(rows, weights), rtol=1e-6, atol=1e-6)
    assert (result is output) == given


def test_contiguous_sums_in_fp32():
    rows = torch.full((1, 64, 1), 1.0).bfloat16()
    rows[0, 0] = 256.0
    ids = torch.zeros(1, 64, dtype=torch.int32)
    result = TopKWeightAndReduceContiguous().apply(None, rows, torch.ones(1, 64), ids, False)
    assert result.item() == torch.tensor(256.0 + 63).bfloat16().item()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("on_input", [False, True])
def test_naive_batched_returns_an_experts_rows_to_their_tokens(rank, on_input):
    local = 2
    rows = slots()
    batches = torch.full((local, T, H), float("nan"))
    counts = [0] * local
    mine = torch.zeros_like(IDS, dtype=torch.bool)
    for t, k in (IDS >= 0).nonzero().tolist():
        expert = int(IDS[t, k]) - rank * local
        if 0 <= expert < local:
            batches[expert, counts[expert]] = rows[t, k]
            counts[expert] += 1
            mine[t, k] = True
    result = TopKWeightAndReduceNaiveBatched(rank).apply(None, batches, WEIGHTS, IDS, on_input)
    weights = torch.ones_like(WEIGHTS) if on_input else WEIGHTS
    torch.testing.assert_close(
        result.double(), expected(rows, weights * mine), rtol=1e-6, atol=1e-6
    )


def test_noop_passes_through_and_copies_only_between_buffers():
    done = torch.randn(T, H)
    reduce = TopKWeightAndReduceNoOP()
    assert reduce.apply(None, done, WEIGHTS, IDS, False) is done
    assert reduce.apply(done, done, WEIGHTS, IDS, False) is done
    output = torch.empty(T, H)
    assert reduce.apply(output, done, WEIGHTS, IDS, False) is output
    assert torch.equal(output, done)
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(5, 4\)"):
        reduce.apply(torch.empty(T, 3), done, WEIGHTS, IDS, False)


def test_delegate_refuses():
    with pytest.raises(RuntimeError, match="must choose"):
        TopKWeightAndReduceDelegate().apply(None, slots(), WEIGHTS, IDS, False)


def test_no_tokens():
    empty = TopKWeightAndReduceContiguous().apply(
        None, torch.empty(0, K, H), WEIGHTS[:0], IDS[:0], False
    )
    assert empty.shape == (0, H)
    empty = TopKWeightAndReduceNaiveBatched(0).apply(
        None, torch.empty(2, 0, H), WEIGHTS[:0], IDS[:0], False
    )
    assert empty.shape == (0, H)
