"""The batched GEMM: what lies past an expert's count is neither read nor written."""

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels import grouped_gemm as module
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.batched_gemm import batched_gemm, batched_gemm_reference
from fusedmoe.kernels.counts import batched_moe_align_block_size
from fusedmoe.tuning.tiles import TileConfig

NAN = float("nan")
TILES = TileConfig(16, 16, 32, 2, 4, 2)


@pytest.fixture(params=["torch", "triton"], autouse=True)
def _bodies(request, monkeypatch):
    if request.param == "triton":
        from fusedmoe.kernels.triton.grouped_gemm import launch

        def gemm(a, b, c, blocks, tiles, *, top_k, bias, activation, activation_config):
            act = device_activation(activation, activation_config)
            launch(a, b, c, blocks, tiles, top_k, bias, act)

        monkeypatch.setattr(module, "grouped_gemm_reference", gemm)


def run(a, b, counts, N, **options):
    blocks = batched_moe_align_block_size(a.shape[1], TILES.block_m, counts)
    c = a.new_full((*a.shape[:2], N), NAN)
    return batched_gemm(a, b, c, blocks, TILES, **options)


@pytest.mark.parametrize("counts", [[0, 5, 33, 1], [33, 33, 33, 33], [0, 0, 0, 0], [-3, 99, 2, 7]])
@pytest.mark.parametrize("activation", [None, MoEActivation.SILU, MoEActivation.RELU2_NO_MUL])
def test_rows_in_use_and_no_others(counts, activation):
    S = 2 if activation is MoEActivation.SILU else 1
    counts = torch.tensor(counts, dtype=torch.int32)
    a, b, bias = torch.randn(4, 33, 40), torch.randn(4, S * 24, 40) / 6, torch.randn(4, S * 24)
    used = torch.arange(33) < counts[:, None]
    a[~used] = NAN
    out = run(a, b, counts, 24, bias=bias, activation=activation)
    expected = torch.full((4, 33, 24), NAN)
    batched_gemm_reference(a, b, expected, counts, bias=bias, activation=activation)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert (~out.isnan().any(-1)).equal(used)


def test_rows_cut_from_a_wider_tensor():
    a, b = torch.randn(3, 20, 64), torch.randn(3, 24, 32)
    counts = torch.tensor([20, 7, 0], dtype=torch.int32)
    left, right = run(a[:, :, ::2], b, counts, 24), run(a[:, :, ::2].contiguous(), b, counts, 24)
    assert left[0].equal(right[0])
    assert left[1, :7].equal(right[1, :7])


def test_no_room_for_rows():
    counts = torch.zeros(3, dtype=torch.int32)
    assert run(torch.randn(3, 0, 32), torch.randn(3, 24, 32), counts, 24).shape == (3, 0, 24)


@pytest.mark.parametrize(
    "broken",
    [
        {"a": torch.zeros(2, 8, 32)},
        {"a": torch.zeros(24, 32)},
        {"b": torch.zeros(2, 24, 32)},
        {"b": torch.zeros(3, 24, 31)},
        {"c": torch.zeros(3, 9, 24)},
        {"c": torch.zeros(24, 8, 3).transpose(0, 2)},
    ],
)
def test_disagreements_are_named(broken):
    blocks = batched_moe_align_block_size(8, 16, torch.ones(3, dtype=torch.int32))
    sound = {
        "a": torch.zeros(3, 8, 32),
        "b": torch.zeros(3, 24, 32),
        "c": torch.zeros(3, 8, 24),
    }
    with pytest.raises(ValueError, match=r"\d"):
        batched_gemm(**(sound | broken), blocks=blocks, tiles=TILES)
