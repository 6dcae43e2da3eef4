"""A token or two with both operands in 8 bits, on a CPU, role by role: picks that share an expert,
picks of none, more tasks than programs, odd sizes, every way rows are rounded."""

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.hopper_w8a8 import w8a8_decode_reference
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton import hopper_w8a8_direct
from fusedmoe.kernels.triton.hopper_w8a8_direct import Rounding
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
)
from fusedmoe.tuning.hopper_tiles import DirectTiles
from fusedmoe.tuning.w8a8_tiles import direct_stream_tiles
from gluon_threads import ROUNDING, Matrix, run

E, NAN = 4, float("nan")
PAIRS = {
    "fp8_block": (FP8_DYNAMIC_128, "group"),
    "fp8_channel": (FP8_DYNAMIC_TOKEN, "row"),
    "fp8_tensor": (FP8_STATIC_TENSOR, "given"),
    "int8_channel": (INT8_DYNAMIC_TOKEN, "row"),
}
ROUTES = {
    "one_token": [[2, 0, 3]],
    "one_expert_twice": [[1, 1]],
    "two_tokens": [[0, 3, 1], [1, 3, 2]],
    "nobody": [[-1, E, -7]],
    "some": [[-1, 2, 9, 0], [3, -1, -1, -1]],
}


@pytest.fixture
def launched(monkeypatch):
    """Launches run here, on three programs."""

    def launcher(kernel, weights):
        def launch(programs, matrices, tensors, numbers, constants, **options):
            views = [Matrix(view, launched.weights[weights]) for view in matrices]
            run(kernel, 3, (*views, *tensors, *numbers, *constants), ROUNDING)

        return launch

    def launched():
        pass

    for i, name in enumerate(("up", "down")):
        kernel = getattr(hopper_w8a8_direct, f"{name}_kernel")
        monkeypatch.setattr(hopper_w8a8_direct, f"_launch_{name}", launcher(kernel, i))
    return launched


def check(launched, fmt, ids, tiles, H, I, gated=True, bias=False, expert_map=None):  # noqa: E741
    torch.manual_seed(0)
    key, how = PAIRS[fmt]
    (T, K), S = ids.shape, 2 if gated else 1
    w1 = quantize(torch.randn(E, S * I, H) / H**0.5, format_named(fmt), shards=S)
    w2 = quantize(torch.randn(E, H, I) / I**0.5, format_named(fmt))
    launched.weights = w1.data, w2.data
    x, weights = torch.randn(T, H).bfloat16(), torch.rand(T, K)
    biases = (torch.randn(E, S * I), torch.randn(E, H)) if bias else (None, None)
    scale = torch.full((1,), 0.02) if key.static else None
    activation = MoEActivation.SILU if gated else MoEActivation.RELU2_NO_MUL
    out, expected = (torch.full((T, H), NAN).bfloat16() for _ in range(2))
    act = torch.full((T * K, I), NAN).bfloat16()
    rounding = Rounding(how, scale, False)
    given = LayerTensors(
        x, w1, w2, weights, ids, out, act, torch.zeros(T * K, H), 3, activation, None, *biases,
        expert_map,
    )  # fmt: skip
    hopper_w8a8_direct.direct(given, (rounding, rounding), tiles)
    given = given._replace(out=expected, act=torch.zeros(T * K, I).bfloat16())
    w8a8_decode_reference(given, (key, key), (scale, scale))
    apart = (out.float() - expected.float()).norm()
    # A value within rounding of a tie may take the other neighbour.
    assert float(apart) <= 1e-2 * float(expected.float().norm())


@pytest.mark.parametrize("fmt", PAIRS)
@pytest.mark.parametrize("route", ROUTES)
def test_layers(route, fmt, launched):
    ids = torch.tensor(ROUTES[route], dtype=torch.int32)
    tiles = (
        DirectTiles(64, 48, 3, 64, 16, 2) if ids.shape[1] > 2 else DirectTiles(32, 32, 2, 64, 24, 5)
    )
    check(launched, fmt, ids, tiles, H=272, I=144)


@pytest.mark.parametrize("fmt", ["fp8_block", "int8_channel"])
def test_biases_no_gate_and_a_map_of_experts(fmt, launched):
    ids = torch.tensor([[5, 0, 6, 2]], dtype=torch.int64)
    expert_map = torch.tensor([1, -1, -1, 0, 2, 3, 7], dtype=torch.int32)
    tiles = direct_stream_tiles(1, 4, 64, 64, 272, 144)
    check(launched, fmt, ids, tiles, 272, 144, gated=False, bias=True, expert_map=expert_map)
    check(launched, fmt, ids, tiles, 272, 144, bias=True)


@pytest.mark.parametrize("fmt", ["fp8_block", "fp8_channel"])
def test_rows_of_several_passes(fmt, launched):
    tiles = DirectTiles(32, 32, 5, 64, 16, 5)
    check(launched, fmt, torch.tensor([[3, 1]], dtype=torch.int32), tiles, H=2176, I=1088)
