"""Rows to their experts and back to their tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmoe.kernels import align, permute
from fusedmoe.kernels.permute import MoEPermuteScratch, moe_permute, moe_unpermute

NAN = float("nan")
MAP = torch.tensor([1, -1, 0, 2, -1], dtype=torch.int32)


@pytest.fixture(params=["torch", "triton"])
def bodies(request, monkeypatch):
    if request.param == "triton":
        from fusedmoe.kernels.triton import align as align_triton
        from fusedmoe.kernels.triton import permute as permute_triton

        monkeypatch.setattr(permute, "align_reference", align_triton.align)
        monkeypatch.setattr(permute, "gather_rows_reference", permute_triton.gather_rows)
        monkeypatch.setattr(permute, "unpermute_reference", permute_triton.unpermute)
    return request.param


def permuted(x, ids, E, local=-1, expert_map=None, scale=None, scratch=None):
    rows = x.new_full((ids.numel(), x.shape[1]), NAN)
    return moe_permute(x, scale, ids, E, local, expert_map, rows, scratch)


def test_the_layout_spelled_out(bodies):
    x = torch.arange(4.0)[:, None].expand(4, 3)
    ids = torch.tensor([[2, 0], [2, 1], [0, 2], [-1, 7]], dtype=torch.int32)
    out = permuted(x, ids, 3)
    # expert 0: slots 1, 4; expert 1: slot 3; expert 2: slots 0, 2, 5; slots 6, 7: nobody's
    assert out.permuted_idx.tolist() == [1, 4, 3, 0, 2, 5, 8, 8]
    assert out.expert_first_token_offset.tolist() == [0, 2, 3, 6]
    assert out.inv_permuted_idx.tolist() == [3, 0, 4, 2, 1, 5, 8, 8]
    assert out.hidden_states[:6, 0].tolist() == [0, 2, 1, 0, 1, 2]
    assert out.hidden_states[6:].isnan().all()
    assert out.expert_first_token_offset.dtype == torch.int64
    assert out.inv_permuted_idx.dtype == out.permuted_idx.dtype == torch.int32


CASES = {
    "none": torch.empty(0, 2, dtype=torch.int32),
    "one": torch.tensor([[4]], dtype=torch.int64),
    "nobody": torch.full((3, 2), -1, dtype=torch.int32),
    "all_on_the_first": torch.zeros(9, 1, dtype=torch.int32),
    "all_on_the_last": torch.full((9, 1), 4, dtype=torch.int32),
    "random": torch.randint(-1, 7, (23, 3)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mapped", [False, True])
def test_there_and_back(bodies, name, mapped):
    ids, (E, expert_map) = CASES[name], (3, MAP) if mapped else (5, None)
    x = torch.randn(ids.shape[0], 37)
    out = permuted(x, ids, 5, E, expert_map)
    live = permute.local_ids(ids, E, expert_map) >= 0
    assert int(out.expert_first_token_offset[-1]) == int(live.sum())
    weights = torch.where(live, torch.rand(ids.shape), NAN)
    back = torch.full_like(x, NAN)
    moe_unpermute(
        back, out.hidden_states, weights, out.inv_permuted_idx, out.expert_first_token_offset
    )
    torch.testing.assert_close(back, x * weights.nan_to_num().sum(1, keepdim=True))
    poisoned = torch.full_like(x, NAN)
    moe_unpermute(poisoned, out.hidden_states, weights, out.inv_permuted_idx)
    assert poisoned.equal(back)


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(-2, 6), max_size=40), local=st.integers(1, 5), mapped=st.booleans())
def test_tables_are_inverse_to_each_other(ids, local, mapped):
    topk_ids = torch.tensor(ids, dtype=torch.int32)[:, None]
    x = torch.randn(len(ids), 2)
    out = moe_permute(x, None, topk_ids, 5, local, MAP if mapped else None)
    R, filled = len(ids), int(out.expert_first_token_offset[-1])
    slots = out.permuted_idx[:filled].long()
    assert (out.permuted_idx[filled:] == R).all()
    assert out.inv_permuted_idx[slots].tolist() == list(range(filled))
    assert int((out.inv_permuted_idx == R).sum()) == R - filled
    assert out.hidden_states[:filled].equal(x[slots])
    starts = out.expert_first_token_offset.tolist()
    assert starts[0] == 0
    assert starts == sorted(starts)


def test_scratch_is_reused_and_never_leaks_an_older_call(bodies):
    scratch = MoEPermuteScratch.allocate(40, 5, "cpu")
    for ids in (CASES["random"][:13], CASES["all_on_the_last"], CASES["nobody"]):
        x = torch.randn(ids.shape[0], 8)
        with_scratch, fresh = permuted(x, ids, 5, scratch=scratch), permuted(x, ids, 5)
        for name in ("expert_first_token_offset", "inv_permuted_idx", "permuted_idx"):
            assert getattr(with_scratch, name).equal(getattr(fresh, name)), name
        assert with_scratch.permuted_idx.data_ptr() == scratch.permuted_idx.data_ptr()


def test_scales_follow_their_rows_only_where_they_have_rows(bodies):
    ids = torch.tensor([[1, 0], [0, -1]])
    x, scale = torch.randn(2, 8), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    out = permuted(x, ids, 2, scale=scale)
    assert out.scale[:3].tolist() == [[1, 2], [3, 4], [1, 2]]
    single = torch.tensor([0.5])
    assert permuted(x, ids, 2, scale=single).scale is single


def test_strided_rows(bodies):
    x = torch.randn(16, 6).t()
    ids = torch.tensor([[1, 0]] * 6)
    assert permuted(x, ids, 2).hidden_states.equal(permuted(x.contiguous(), ids, 2).hidden_states)
    out = permuted(x, ids, 2)
    back = torch.full((16, 6), NAN).t()
    moe_unpermute(back, out.hidden_states, torch.full((2, 6), 0.5).t(), out.inv_permuted_idx)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize(
    "broken",
    [
        {"topk_ids": torch.zeros(4, 2, dtype=torch.int32)},
        {"topk_ids": torch.zeros(3, 2)},
        {"permuted_hidden_states": torch.zeros(5, 8)},
        {"a1q_scale": torch.zeros(2, 4)},
        {"scratch": MoEPermuteScratch.allocate(5, 4, "cpu")},
        {"scratch": MoEPermuteScratch.allocate(6, 3, "cpu")},
    ],
)
def test_arguments_that_disagree_are_named(broken):
    sound = {
        "hidden_states": torch.zeros(3, 8),
        "a1q_scale": None,
        "topk_ids": torch.zeros(3, 2, dtype=torch.int32),
        "n_expert": 4,
    }
    with pytest.raises(ValueError, match=r"\d"):
        moe_permute(**(sound | broken))
    with pytest.raises(ValueError, match=r"\d"):
        moe_unpermute(torch.zeros(3, 8), torch.zeros(6, 8), torch.zeros(3, 2), torch.zeros(5))


def test_alignment_with_blocks_of_one_is_the_permutation():
    ids = torch.tensor([[2, 0], [1, 2]])
    assert align.moe_align_block_size(ids, 1, 3).sorted_ids.tolist() == [1, 2, 0, 3]


def test_offsets_beyond_the_rows_read_none_of_them(bodies):
    rows, out = torch.ones(4, 40), torch.full((1, 40), NAN)
    index = torch.tensor([3, 5], dtype=torch.int32)
    moe_unpermute(out, rows[:4], torch.ones(1, 2), index, torch.tensor([0, 6]))
    assert torch.equal(out, torch.ones(1, 40))
