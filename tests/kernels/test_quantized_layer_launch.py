"""The layer of a few tokens with 4-bit weights in one launch, its text compiled for the CPU:
formats, blocks of 8 and 16 slots, rows in parts, rings of other places for either GEMM, ids of no
expert."""

import shutil

import pytest
import torch
from test_cuda_decode import NAN, OAI, RELU2, SILU, routed, rows, tile_map, warps, weights

from cuda_on_cpu import KernelOnCpu
from fusedmoe.kernels.cuda import quantized_launch, quantized_layer, quantized_rows
from fusedmoe.kernels.hopper_quantized import quantized_decode_reference, runs_in_one_launch
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.tuning.cuda_tiles import CudaDecodeTiles

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles with g++")


@pytest.fixture
def on_cpu(monkeypatch):
    def kernel(sources, defines, threads, shared, cooperative):
        assert cooperative
        given = sources, sources[-1].removesuffix(".cu"), defines, threads, shared
        return KernelOnCpu(*given, cooperative=True)

    monkeypatch.setattr(quantized_launch, "_kernel", kernel)
    monkeypatch.setattr(quantized_rows, "tile_map", tile_map)


def layer_of(fmt, act, ids, e, H, I, *, programs, bias=False, expert_map=None):  # noqa: E741
    (T, K), R = ids.shape, ids.numel()
    w1, w2 = weights(fmt, e, I, H, act), weights(fmt, e, H, I, None)
    biases = (torch.randn(e, n).bfloat16() if bias else None for n in (w1.shape[1], H))
    return LayerTensors(
        torch.randn(T, H).bfloat16(), w1, w2, torch.rand(T, K), ids,
        torch.full((T, H), NAN).bfloat16(), torch.full((R, I), NAN).bfloat16(),
        torch.full((R, H), NAN), programs, act, None, *biases, expert_map,
    )  # fmt: skip


def both(layer, *tiles):
    """(of the kernel, of the definition)."""
    expected = layer._replace(out=layer.out.clone(), act=layer.act.clone())
    quantized_decode_reference(expected)
    assert quantized_layer.run_layer(layer, CudaDecodeTiles(*tiles))
    return layer.out.double(), expected.out.double()


# format, activation, T, K, E, H, I, tiles, what else
CASES = {
    "int4": ("int4_g128", SILU, 9, 4, 9, 512, 256, rows(4, 2), rows(2, 4), {}),
    "int4_bias": ("int4_g32", SILU, 20, 2, 4, 512, 256, rows(4, 2), rows(2, 4), {"bias": True}),
    "more_places_in_the_second": (
        "int4_g128", SILU, 17, 4, 6, 512, 256, rows(4, 2, 3, tiles=2), rows(2, 4, 5), {},
    ),
    "fewer_places_in_the_second": (
        "int4_g32", SILU, 17, 4, 6, 256, 256, rows(2, 2, 7), rows(2, 4, 2, tiles=2), {"local": 4},
    ),
    "mxfp4": ("mxfp4", OAI, 40, 2, 9, 320, 192, rows(5, 2), rows(3, 2), {"bias": True}),
    "mxfp4_no_gate": ("mxfp4", RELU2, 9, 2, 4, 320, 192, rows(5, 1), rows(3, 2), {"bias": True}),
    "fewer_warps_in_the_second": (
        "int4_g128", SILU, 9, 2, 4, 512, 256, rows(4, 2), rows(2, 2), {},
    ),
    "fewer_warps_in_the_first": (
        "int4_g128", SILU, 9, 2, 4, 512, 256, rows(4, 1), rows(2, 4), {},
    ),
    "more_experts_than_threads": (
        "int4_g32", SILU, 40, 3, 700, 256, 64, rows(4, 2), rows(1, 4), {},
    ),
    "sixteen_slots_and_parts": (
        "int4_g128", SILU, 33, 2, 3, 512, 512, rows(4, 2, slots=16),
        rows(2, 2, slots=16, parts=2), {},
    ),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_a_layer(name, on_cpu):
    fmt, act, T, K, E, H, I, first, second, more = CASES[name]  # noqa: E741
    torch.manual_seed(0)
    ids, expert_map = routed(T, K, E, more.get("local"))
    layer = layer_of(
        fmt, act, ids, more.get("local") or E, H, I, programs=3, bias=more.get("bias", False),
        expert_map=expert_map,
    )  # fmt: skip
    for programs in (3, 5):
        out, expected = both(layer._replace(programs=programs), first, second)
        assert (out - expected).norm() <= 1e-3 * expected.norm()


@needs_compiler
def test_launches_one_after_the_other(on_cpu):
    """No expert at all, all tokens on one, and rows that are NaN go before; ids in 64 bits."""
    torch.manual_seed(0)
    T, K, E = 9, 2, 5
    layer = layer_of("int4_g128", SILU, torch.zeros(T, K).long(), E, 512, 256, programs=3)
    for round_ in range(4):
        ids = torch.randint(-1, E + 1, (T, K))
        ids = (ids, torch.full_like(ids, -1), torch.full_like(ids, 3), ids)[round_]
        x = torch.randn(T, 512).bfloat16()
        if round_ == 2:
            x[4] = NAN
        given = layer._replace(topk_ids=ids, x=x, out=torch.full_like(layer.out, 7.0))
        out, expected = both(given, rows(4, 2), rows(2, 4))
        assert out.isnan().equal(expected.isnan())
        out, expected = out.nan_to_num(), expected.nan_to_num()
        assert (out - expected).norm() <= 1e-3 * expected.norm()


def test_where_one_launch_is_chosen():
    tiles = CudaDecodeTiles(rows(4, 2), rows(2, 4))

    def chosen(fmt="int4_g32", T=9, I=256, tiles=tiles, **how):  # noqa: E741
        layer = layer_of(fmt, SILU, torch.zeros(T, 4).int(), 3, 256, I, programs=1)
        return runs_in_one_launch(layer, tiles, **how)

    assert chosen()
    assert chosen(T=64)
    for other in ({"T": 8}, {"T": 65}, {"T": 64, "I": 288}, {"fmt": "mxfp4"}):
        assert not chosen(**other)
        assert chosen(**other, where_faster=False)
    assert not chosen(T=129, where_faster=False)
    assert not chosen(tiles=CudaDecodeTiles(warps(), rows(2, 4)), where_faster=False)
    lone = CudaDecodeTiles(rows(4, 2, slots=1), rows(2, 4, slots=1))
    assert not chosen(tiles=lone, where_faster=False)


def test_nothing_is_launched_where_rings_do_not_fit():
    layer = layer_of("int4_g32", SILU, torch.zeros(9, 4).int(), 3, 4096, 256, programs=1)
    tiles = CudaDecodeTiles(rows(8, 1, tiles=4), rows(1, 4))
    assert not quantized_layer.run_layer(layer, tiles)
