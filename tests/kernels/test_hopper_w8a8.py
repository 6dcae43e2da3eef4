"""The streaming kernel of 8 bits on a CPU: tables guessed right and wrong, more tasks than
programs, odd sizes, every way rows are rounded."""

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.activation import NO_ACTIVATION, device_activation
from fusedmoe.kernels.align import align_reference, padded_slots
from fusedmoe.kernels.grouped_gemm_quantized import QuantizedProduct
from fusedmoe.kernels.grouped_gemm_quantized_w8a8 import w8a8_gemm_reference
from fusedmoe.kernels.quantize import quantize_rows_reference
from fusedmoe.kernels.triton import hopper_w8a8
from fusedmoe.kernels.triton.hopper_w8a8 import Rows
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
)
from fusedmoe.tuning.quantized_tiles import QuantizedTile
from fusedmoe.tuning.w8a8_tiles import StreamTile
from gluon_threads import ROUNDING, Matrix, run

E = 4


@pytest.fixture
def launched(monkeypatch):
    """Launches run here, on so many programs."""

    def launcher(kernel):
        def launch(programs, matrices, tensors, numbers, constants, **options):
            views = [Matrix(view, launched.weights) for view in matrices]
            run(kernel, 3, (*views, *tensors, *numbers, *constants), ROUNDING)

        return launch

    def launched():
        pass

    monkeypatch.setattr(hopper_w8a8, "_launch_gemm", launcher(hopper_w8a8.gemm_kernel))
    return launched


def tables(ids, slots):
    P = padded_slots(ids.numel(), slots, E, False)
    return align_reference(ids.flatten(), slots, E, P, None, False, False)[0]


ROUTES = {
    "an_expert_a_block": torch.arange(8) % E,
    "one_expert_idle": torch.tensor([0, 0, 1, 3, 3, 3, 1, 0]),
    "one_expert_alone": torch.full((8,), 2),
    "two_blocks_of_one": torch.tensor([1] * 9 + [0, 3]),
    "nobody": torch.full((5,), -1),
}
TILES = {
    "whole": StreamTile(256, 128, 8, 2, 2, 3, 1),
    "by_steps": StreamTile(128, 64, 8, 1, 4, 3, 1),
    "part": StreamTile(128, 48, 8, 1, 2, 3, 1),
}


def up(fmt, key, ids, tile, launched, H=400, I=144):  # noqa: E741
    torch.manual_seed(0)
    w = quantize(torch.randn(E, 2 * I, H), format_named(fmt), shards=2)
    x = torch.randn(len(ids), H).bfloat16()
    scale = torch.full((1,), 0.02) if key.static else None
    rows, blocks = quantize_rows_reference(x, key, scale), tables(ids, tile.slots)
    out, largest = torch.full((len(ids), I), 7.0).bfloat16(), torch.zeros(len(ids)).int()
    launched.weights = w.data
    act = device_activation(MoEActivation.SILU, None)
    given = Rows(x, scale, 1, "given") if key.static else Rows.stored(rows, 1)
    hopper_w8a8.gemm(given, w, out, None, act, blocks, tile, 3, largest=largest, guess=True)
    expected = torch.full((len(ids), I), 7.0).bfloat16()
    like = QuantizedTile(64, tile.slots, 128, 1, 4, 2)
    silu = None, MoEActivation.SILU
    product = QuantizedProduct(rows.data, w, expected, blocks, like, 1, *silu)
    w8a8_gemm_reference(product, rows.scale, key)
    return out, expected, largest


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("route", ROUTES)
def test_up(route, tile, launched):
    ids = ROUTES[route].int()[:, None]
    out, expected, largest = up("fp8_block", FP8_DYNAMIC_128, ids, TILES[tile], launched)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    found = largest.view(torch.float32)
    live = ids[:, 0] >= 0
    torch.testing.assert_close(found[live], out[live].float().abs().amax(1))
    assert not found[~live].any()


@pytest.mark.parametrize(
    ("fmt", "key"),
    [
        *(("fp8_channel", FP8_DYNAMIC_TOKEN), ("int8_channel", INT8_DYNAMIC_TOKEN)),
        ("fp8_tensor", FP8_STATIC_TENSOR),
    ],
    ids=str,
)
def test_up_with_scales_of_rows(fmt, key, launched):
    ids = ROUTES["one_expert_idle"].int()[:, None]
    out, expected, _ = up(fmt, key, ids, TILES["whole"], launched)
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("fmt", "key"),
    [
        *(("fp8_block", FP8_DYNAMIC_128), ("fp8_channel", FP8_DYNAMIC_TOKEN)),
        ("int8_channel", INT8_DYNAMIC_TOKEN),
    ],
    ids=str,
)
def test_down(fmt, key, tile, launched):
    torch.manual_seed(0)
    H, I = 336, 272  # noqa: E741
    w = quantize(torch.randn(E, H, I), format_named(fmt))
    ids = ROUTES["two_blocks_of_one"].int()[:, None]
    act, blocks = torch.randn(len(ids), I).bfloat16(), tables(ids, 8)
    y, expected = (torch.full((len(ids), H), 7.0) for _ in range(2))
    launched.weights = w.data
    largest = act.float().abs().amax(1).view(torch.int32)
    rows = Rows(act, None, 1, "group")
    if key.group_shape.col == -1:
        rows = Rows(act, largest, 1, "largest")
    hopper_w8a8.gemm(rows, w, y, None, NO_ACTIVATION, blocks, TILES[tile], 3, early=True)
    q, scale = quantize_rows_reference(act, key)
    eight = QuantizedTile(64, 8, 128, 1, 4, 2)
    w8a8_gemm_reference(QuantizedProduct(q, w, expected, blocks, eight, 1), scale, key)
    # A value within rounding of a tie may take the other neighbour.
    assert float((y - expected).norm() / expected.norm()) < 5e-3
