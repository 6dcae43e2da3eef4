"""Sums over ranks: what is partial is summed once, what is whole is added once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedmoe.runner.reduction import Extent, RankSum, Summand, commutes_with_sum

GROUP = object()


class Ranks:
    """Plays all ranks of a group: each all_reduce adds up what the ranks would have sent."""

    def __init__(self, values: list[torch.Tensor]) -> None:
        self.total = sum(values)
        self.calls = 0

    def __call__(self, tensor: torch.Tensor, group: object) -> None:
        assert group is GROUP
        assert tensor.is_contiguous()
        self.calls += 1
        tensor.copy_(self.total)


def test_one_rank_has_all_of_it():
    alone = RankSum()
    value = torch.ones(2, 3)
    summand = alone.partial(value)
    assert summand.extent is Extent.WHOLE
    assert alone.reduced(summand).value is value


def test_a_partial_is_summed_where_ranks_communicate(monkeypatch):
    parts = [torch.full((2, 3), float(r)) for r in range(3)]
    ranks = Ranks(parts)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks)
    three = RankSum(size=3, rank=1, group=GROUP)
    strided = torch.full((2, 5), 1.0)[:, :3]
    summed = three.reduced(three.partial(strided))
    assert summed.extent is Extent.WHOLE
    assert (summed.value == 3).all()
    assert three.reduced(summed) is summed
    assert ranks.calls == 1


@pytest.mark.parametrize(
    "silent", [RankSum(size=3, rank=1), RankSum(size=3, rank=1, group=GROUP, enabled=False)]
)
def test_without_a_group_or_the_callers_wish_nothing_is_sent(silent):
    part = silent.partial(torch.ones(2))
    assert part.extent is Extent.PARTIAL
    assert silent.reduced(part) is part


W, P = Extent.WHOLE, Extent.PARTIAL


@pytest.mark.parametrize(("left", "right", "sends"), [(W, W, 0), (P, P, 0), (P, W, 1), (W, P, 1)])
def test_adding_communicates_only_where_extents_differ(left, right, sends, monkeypatch):
    part = torch.full((2,), 10.0)
    ranks = Ranks([part, part])
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks)
    two = RankSum(size=2, rank=1, group=GROUP)
    a, b = (Summand(part.clone() if e is P else torch.ones(2), e) for e in (left, right))
    kept = b.value.clone()
    total = two.add(a, b)
    assert ranks.calls == sends
    assert torch.equal(b.value, kept)
    if sends:
        assert total.extent is W
        assert (total.value == 21).all()
    else:
        assert total.extent is left


@pytest.mark.parametrize("whole_first", [False, True])
def test_silent_ranks_add_what_is_whole_on_rank_0_alone(whole_first):
    results = []
    for rank in range(3):
        silent = RankSum(size=3, rank=rank)
        whole, part = Summand(torch.full((2,), 5.0), W), Summand(torch.ones(2), P)
        total = silent.add(*((whole, part) if whole_first else (part, whole)))
        assert total.extent is P
        results.append(total.value)
    assert (sum(results) == 3 + 5).all()


class Halving(nn.Module):
    is_linear = True


@pytest.mark.parametrize(
    ("transform", "commutes"),
    [
        (None, True),
        (nn.Identity(), True),
        (nn.Linear(2, 2, bias=False), True),
        (nn.Linear(2, 2), False),
        (nn.ReLU(), False),
        (Halving(), True),
    ],
)
def test_which_transforms_commute_with_a_sum(transform, commutes):
    assert commutes_with_sum(transform) is commutes
