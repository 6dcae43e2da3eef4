"""The router's linear layer by clusters of blocks, its text compiled for the CPU where there is no
GPU: odd sizes, columns that end inside a block's part, other tokens' bits, rows that are NaN."""

from __future__ import annotations

import shutil

import pytest
import torch

from cuda_on_cpu import KernelOnCpu
from fusedmoe.kernels.cuda import gate_cluster
from fusedmoe.kernels.gate import CLUSTER, PIECE, cluster_tile, fits_cluster, gate_linear
from gpu_marks import needs_hopper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and shutil.which("g++") is None, reason="compiles with g++"
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    def kernel(defines, threads, shared):
        files = ("gate_cluster.cu",)
        return KernelOnCpu(files, "gate_cluster", defines, threads, shared, CLUSTER)

    if DEVICE == "cpu":
        monkeypatch.setattr(gate_cluster, "_kernel", kernel)


def logits(x, weight, bias=None, out_dtype=FP32):
    tile = cluster_tile(x.shape[1] * x.element_size())
    return gate_cluster.gate_cluster(x, weight, bias, out_dtype, tile)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("T", "H", "E"),
    [(5, 264, 40), (16, 1032, 16), (19, 1544, 33), (1, 8, 1), (5, 4616, 17), (9, 4616, 3)],
)
def test_agrees_with_the_definition(T, H, E, dtype):
    torch.manual_seed(0)
    x = torch.randn(T, H, device=DEVICE).to(dtype)
    weight = (torch.randn(E, H, device=DEVICE) / H**0.5).to(dtype)
    bias = torch.randn(E, device=DEVICE).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(logits(x, weight, bias).double(), exact, rtol=1e-5, atol=3e-6)
    for out_dtype in (BF16, FP16):
        out = logits(x, weight, bias.float(), out_dtype)
        assert out.dtype is out_dtype
        torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


def test_takes_strides_and_writes_every_logit(monkeypatch):
    """The surroundings are NaN: one read out of place would show."""
    wide_x = torch.full((9, 400), NAN, device=DEVICE)
    wide_w = torch.full((37, 320), NAN, device=DEVICE)
    x, weight = wide_x[1:8, 4:268], wide_w[2:36:2, :264]
    x.normal_()
    weight.normal_()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))
    torch.testing.assert_close(logits(x, weight), x @ weight.T, rtol=1e-5, atol=1e-4)


def test_other_tokens_change_no_bit():
    x, weight = torch.randn(19, 264, device=DEVICE), torch.randn(20, 264, device=DEVICE)
    whole = logits(x, weight)
    assert torch.equal(logits(x[7:8], weight), whole[7:8])
    assert torch.equal(logits(x[7:13], weight), whole[7:13])
    x[9, 100] = NAN
    dirty = logits(x, weight)
    assert dirty[9].isnan().all()
    others = torch.arange(19, device=DEVICE) != 9
    assert torch.equal(dirty[others], whole[others])


@pytest.mark.parametrize("row_bytes", [16, 64, 4096, 5760, 8192, 14336, 28672, 65536])
def test_tiles_cover_a_row_with_little_beyond_it(row_bytes):
    tile = cluster_tile(row_bytes)
    covered = CLUSTER * tile.warps * tile.pieces * PIECE
    assert row_bytes <= covered
    assert covered < 1.25 * row_bytes + CLUSTER * 4 * PIECE
    assert 4 <= tile.warps <= 8


def test_rows_that_are_too_long_have_no_tile():
    assert cluster_tile(1 << 20) is None


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("T", [5, 16, 64])
def test_a_gate_on_hopper_goes_through_it(T, dtype, monkeypatch):
    x, weight = torch.randn(T, 2048, device=DEVICE).to(dtype), torch.randn(128, 2048, device=DEVICE)
    weight = weight.to(dtype)
    launched = []
    whole = gate_cluster.gate_cluster
    monkeypatch.setattr(gate_cluster, "gate_cluster", lambda *a: launched.append(a) or whole(*a))
    first = gate_linear(x, weight, out_dtype=FP32)
    assert len(launched) == 1
    exact = x.double() @ weight.double().T
    assert (first.double() - exact).norm() <= 6e-7 * exact.norm()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = gate_linear(x, weight, out_dtype=FP32)
    for _ in range(20):
        captured.fill_(NAN)
        graph.replay()
        assert torch.equal(captured, first)


def test_operands_that_it_does_not_take():
    x, weight = torch.zeros(5, 64), torch.zeros(3, 64)
    assert fits_cluster(x, weight, None, FP32)
    assert not fits_cluster(x.bfloat16(), weight, None, FP32)
    assert not fits_cluster(x, weight, None, torch.float64)
    assert not fits_cluster(x[:, :63], weight[:, :63], None, FP32)
    assert not fits_cluster(x[:, 1:61], weight[:, 1:61], None, FP32)
    assert not fits_cluster(x, weight, torch.zeros(3, dtype=torch.float64), FP32)
