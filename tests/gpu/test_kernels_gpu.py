"""The kernels of the Triton experts on a GPU against their references, at larger sizes."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.kernels.activation import moe_activation
from fusedmoe.kernels.align import align_reference, moe_align_block_size, padded_slots
from fusedmoe.kernels.counts import (
    batched_align_reference,
    batched_moe_align_block_size,
    count_expert_num_tokens,
    count_reference,
    remap_reference,
    remap_topk_to_local,
)
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum, moe_fused_mul_sum_reference
from fusedmoe.kernels.permute import moe_permute, moe_unpermute

pytestmark = pytest.mark.gpu
NAN = float("nan")
BIG = 2**31 + 2**22  # elements: more than 32-bit addresses reach


def routing(T, K, E, dtype=torch.int32):
    ids = torch.rand(T, E).topk(K, dim=1).indices.to(dtype)
    ids[torch.rand(T, K) < 0.05] = -1
    return ids


def placement(E, local):
    expert_map = torch.full((E,), -1, dtype=torch.int32)
    expert_map[torch.randperm(E)[:local]] = torch.arange(local, dtype=torch.int32)
    return expert_map


@pytest.mark.parametrize(
    ("T", "K", "E"),
    [(1, 8, 128), (128, 8, 128), (512, 8, 128), (513, 8, 128), (8192, 8, 128), (8192, 2, 8),
     (4096, 8, 512), (1, 1, 1)],
)  # fmt: skip
@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("mapped", [False, True])
def test_align(T, K, E, block_size, mapped):
    ids = routing(T, K, E)
    expert_map = placement(E, max(1, E // 3)) if mapped else None
    for drop in (False, True) if mapped else (False,):
        P = padded_slots(T * K, block_size, E, False)
        expected, scatter = align_reference(ids.flatten(), block_size, E, P, expert_map, drop, True)
        on_device = None if expert_map is None else expert_map.cuda()
        got = moe_align_block_size(ids.cuda(), block_size, E, on_device, False, drop, True)
        for left, right in zip(got, (*expected, scatter), strict=True):
            assert left.cpu().equal(right)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_and_names(dtype):
    ids, expert_map = routing(4000, 8, 256, dtype), placement(256, 100)
    counts = count_expert_num_tokens(ids.cuda(), 100, expert_map.cuda())
    assert counts.cpu().equal(count_reference(ids, 100, expert_map))
    local = remap_topk_to_local(ids.cuda(), expert_map.cuda())
    assert local.cpu().equal(remap_reference(ids, expert_map))
    rows = torch.randint(0, 1100, (64,), dtype=torch.int32)
    got = batched_moe_align_block_size(1000, 64, rows.cuda())
    for left, right in zip(got, batched_align_reference(1000, 64, rows, 64 * 1024), strict=True):
        assert left.cpu().equal(right)


@pytest.mark.parametrize("T", [1, 100, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mul_sum(T, dtype):
    x, weights, ids = torch.randn(T, 8, 1000).to(dtype), torch.rand(T, 8), routing(T, 8, 64)
    expected = moe_fused_mul_sum_reference(x, weights, topk_ids=ids)
    x[ids < 0] = NAN
    got = moe_fused_mul_sum(x.cuda(), weights.cuda(), topk_ids=ids.cuda())
    torch.testing.assert_close(got.cpu(), expected)


@pytest.mark.parametrize("activation", [a for a in MoEActivation if a is not MoEActivation.RELU2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activation(activation, dtype):
    config = ApplyMoEActivationConfig(clamp_limit=3.0, situ_beta=2.0, situ_linear_beta=1.5)
    x = (torch.randn(300, 770) * 4).to(dtype)
    width = 385 if activation.is_gated else 770
    out = torch.full((300, width), NAN, dtype=dtype, device="cuda")
    moe_activation(activation, out, x.cuda(), config)
    assert not out.isnan().any()
    expected = activation_reference(activation, x.double(), config)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 3e-5
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", [a for a in MoEActivation if a is not MoEActivation.RELU2])
def test_clamps_let_nan_through(activation):
    config = ApplyMoEActivationConfig(clamp_limit=3.0, situ_beta=2.0, situ_linear_beta=1.5)
    x = torch.full((2, 64), NAN, device="cuda")
    out = torch.zeros(2, 32 if activation.is_gated else 64, device="cuda")
    assert moe_activation(activation, out, x, config).isnan().all()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("T", [1, 700, 5000])
def test_permute_there_and_back(T, mapped):
    ids, x = routing(T, 4, 32), torch.randn(T, 520).bfloat16()
    E, expert_map = (11, placement(32, 11)) if mapped else (32, None)
    expected = moe_permute(x, None, ids, 32, E, expert_map)
    on_device = None if expert_map is None else expert_map.cuda()
    got = moe_permute(x.cuda(), None, ids.cuda(), 32, E, on_device)
    rows = int(expected.expert_first_token_offset[-1])
    assert got.hidden_states[:rows].cpu().equal(expected.hidden_states[:rows])
    for left, right in zip(got[2:], expected[2:], strict=True):
        assert left.cpu().equal(right)
    got.hidden_states[rows:] = NAN
    weights = torch.rand(T, 4)
    back = torch.full((T, 520), NAN, device="cuda", dtype=torch.bfloat16)
    moe_unpermute(back, got.hidden_states, weights.cuda(), got.inv_permuted_idx)
    live = expected.inv_permuted_idx.view(T, 4) < ids.numel()
    share = torch.where(live, weights, 0.0).sum(1, keepdim=True)
    torch.testing.assert_close(back.float().cpu(), x.float() * share, rtol=1e-2, atol=1e-2)


def test_sizes_past_two_to_the_31_elements():
    H = 4096
    R = BIG // H
    x = torch.randn(R // 2, H, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, 4, (R // 2, 2), device="cuda", dtype=torch.int32)
    rows = moe_permute(x, None, ids, 4)
    last = rows.permuted_idx[-3:].long()
    assert rows.hidden_states[-3:].equal(x[last // 2])
    back = torch.full_like(x, NAN)
    weights = torch.full((R // 2, 2), 0.5, device="cuda")
    moe_unpermute(back, rows.hidden_states, weights, rows.inv_permuted_idx)
    assert back.equal(x)
    out = torch.empty(R, H // 2, device="cuda", dtype=torch.bfloat16)
    moe_activation(MoEActivation.SILU, out, rows.hidden_states)
    expected = activation_reference(MoEActivation.SILU, rows.hidden_states[-3:])
    torch.testing.assert_close(out[-3:].float(), expected, rtol=1e-2, atol=1e-2)
    assert not out.isnan().any()


def test_nothing_waits_for_the_device():
    ids, x = routing(5000, 8, 64).cuda(), torch.randn(5000, 256, device="cuda")
    expert_map, weights = placement(64, 20).cuda(), torch.rand(5000, 8, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_align_block_size(ids, 64, 64, expert_map, ignore_invalid_experts=True)
        rows = moe_permute(x, None, ids, 64, 20, expert_map)
        moe_unpermute(x, rows.hidden_states, weights, rows.inv_permuted_idx)
        counts = count_expert_num_tokens(ids, 20, expert_map)
        batched_moe_align_block_size(5000, 64, counts)
        remap_topk_to_local(ids, expert_map)
    finally:
        torch.cuda.set_sync_debug_mode(before)
