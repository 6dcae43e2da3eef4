"""mxfp4 weights that stream by whole rows: the layer against its definition, and the same bits in
every run."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.hopper_support import missing_gluon
from fusedmoe.kernels.device import multiprocessors_of
from fusedmoe.kernels.hopper_quantized import (
    decode_tiles_for,
    lone_slots,
    quantized_decode,
    quantized_decode_reference,
)
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.testing.tolerances import relative_error
from fusedmoe.tuning.cuda_tiles import CudaRowsTile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]

# experts, picks, H, I, tokens; slots that share a block
CASES = {
    "rows_as_they_lie": (16, 4, 2880, 320, 9, 8),
    "swizzled": (16, 4, 1024, 256, 9, 8),
    "sixteen": (4, 2, 1024, 768, 29, 16),
    "lone": (96, 4, 512, 256, 5, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    if missing_gluon():
        pytest.skip("needs Hopper's experts")
    e, K, H, I, T, slots = CASES[name]  # noqa: E741
    torch.manual_seed(0)
    act, fmt = MoEActivation.SWIGLUOAI, format_named("mxfp4")

    def weight(shards, N, D):
        values = torch.randn(e, shards * N, D, device="cuda") / D**0.5
        return quantize(values, fmt, shards=shards, interleaved=shards == 2)

    w1, w2 = weight(2, I, H), weight(1, H, I)
    ids = torch.stack([torch.randperm(e, device="cuda")[:K] for _ in range(T)]).int()
    ids[0, 0], ids[-1, -1] = -1, e + 3
    R, programs = T * K, multiprocessors_of(torch.device("cuda"))
    tiles = decode_tiles_for(R, w1, w2, lone_slots(R, e, None), programs)
    assert isinstance(tiles.gemm1, CudaRowsTile)
    assert isinstance(tiles.gemm2, CudaRowsTile)
    assert tiles.slots == slots
    x, picked = torch.randn(T, H, device="cuda").bfloat16(), torch.rand(T, K, device="cuda")
    x[1] = float("nan")
    biases = {
        "w1_bias": torch.randn(e, 2 * I, device="cuda"),
        "w2_bias": torch.randn(e, H, device="cuda"),
    }
    outs = []
    for function in (quantized_decode_reference, *[quantized_decode] * 5):
        out = torch.full_like(x, float("nan"))
        act_rows = torch.full((R, I), float("nan"), device="cuda").bfloat16()
        y = torch.full((R, H), float("nan"), device="cuda")
        function(
            x, w1, w2, picked, ids, out, act_rows, y, activation=act, programs=programs, **biases
        )  # fmt: skip
        outs.append(out)
    expected, found, *others = outs
    others_rows = [row for row in range(T) if row != 1]
    assert found[1].isnan().all()
    assert relative_error(found[others_rows], expected[others_rows].double()).frobenius < 4e-3
    assert all(one[others_rows].equal(found[others_rows]) for one in others)
