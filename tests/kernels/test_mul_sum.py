"""Weighted sum over the picks: dead slots never reach the sum, whatever lies in their rows."""

import pytest
import torch

from fusedmoe.kernels.mul_sum import moe_fused_mul_sum, moe_fused_mul_sum_reference

NAN = float("nan")


def triton_mul_sum(
    inputs, topk_weights, topk_ids=None, expert_map=None, num_valid=None, local=None
):
    from fusedmoe.kernels.triton.mul_sum import mul_sum

    out = inputs.new_full((inputs.shape[0], inputs.shape[2]), NAN)
    mul_sum(inputs, topk_weights, out, topk_ids, expert_map, num_valid, local)
    return out


def case(T, K, H, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(T, K, H, generator=gen).to(dtype)
    return x, torch.rand(T, K, generator=gen), torch.randint(0, 6, (T, K), generator=gen)


@pytest.mark.parametrize(
    ("T", "K", "H"), [(0, 2, 8), (1, 1, 1), (3, 2, 33), (5, 8, 300), (2, 11, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_agrees_with_the_definition(T, K, H, dtype):
    x, weights, _ = case(T, K, H, dtype)
    expected = (x.double() * weights.double()[:, :, None]).sum(1)
    torch.testing.assert_close(
        moe_fused_mul_sum(x, weights).double(), expected, rtol=2e-3, atol=2e-3
    )
    torch.testing.assert_close(
        triton_mul_sum(x, weights), moe_fused_mul_sum_reference(x, weights), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("run", [triton_mul_sum, moe_fused_mul_sum_reference])
def test_dead_slots_are_not_read_into_the_sum(run, ids_dtype):
    """-1, out of range of the map, remote, past the local experts: all poisoned with NaN."""
    ids = torch.tensor([[0, -1, 1], [9, 2, -7], [3, 3, 3], [1, 0, 4]], dtype=ids_dtype)
    expert_map = torch.tensor([1, 0, -1, 5, -1], dtype=torch.int32)
    x, weights, _ = case(4, 3, 10)
    alive = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    expected = torch.where(alive[:, :, None], x * weights[:, :, None], 0.0).sum(1)
    x[~alive], weights[~alive] = NAN, NAN
    if run is triton_mul_sum:
        out = run(x, weights, ids, expert_map, local=2)
    else:
        out = run(x, weights, None, ids, expert_map, num_local_experts=2)
    torch.testing.assert_close(out, expected)


def test_one_nan_row_harms_its_own_token_alone():
    x, weights, ids = case(3, 2, 40)
    x[1, 0] = NAN
    out = triton_mul_sum(x, weights, ids)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("valid", [0, 2, 4])
def test_rows_past_the_valid_count_are_left_alone(valid):
    x, weights, ids = case(4, 2, 20)
    count = torch.tensor([valid], dtype=torch.int32)
    for out in (
        triton_mul_sum(x, weights, ids, num_valid=count),
        moe_fused_mul_sum(
            x, weights, torch.full((4, 20), NAN), topk_ids=ids, num_valid_tokens=count
        ),
    ):
        assert not out[:valid].isnan().any()
        assert out[valid:].isnan().all()


def test_strided_inputs_and_outputs():
    base, weights, ids = case(4, 3, 50)
    x = base.repeat(2, 1, 2)[::2, :, ::2]
    strided_weights = weights.t().contiguous().t()
    expected = moe_fused_mul_sum_reference(x.contiguous(), weights)
    torch.testing.assert_close(
        triton_mul_sum(x, strided_weights, ids.t().contiguous().t()), expected
    )
    out = torch.full((50, 4), NAN).t()
    assert moe_fused_mul_sum(x, strided_weights, out) is out
    torch.testing.assert_close(out, expected)


def test_no_weights_is_a_plain_sum():
    x, _, ids = case(3, 4, 16)
    torch.testing.assert_close(triton_mul_sum(x, None, ids), x.sum(1))
    torch.testing.assert_close(moe_fused_mul_sum(x, None), x.sum(1))


@pytest.mark.parametrize(
    "broken",
    [
        {"inputs": torch.zeros(3, 4)},
        {"topk_weights": torch.zeros(3, 1)},
        {"topk_ids": torch.zeros(2, 2, dtype=torch.int32)},
        {"outputs": torch.zeros(3, 5)},
        {"expert_map": torch.zeros(3, dtype=torch.int32)},
        {"num_valid_tokens": torch.zeros((), dtype=torch.int32)},
    ],
)
def test_shapes_that_disagree_are_named(broken):
    sound = {"inputs": torch.zeros(3, 2, 4), "topk_weights": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"\d"):
        moe_fused_mul_sum(**(sound | broken))
