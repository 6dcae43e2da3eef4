"""4-bit weights that stream by whole rows: the layer against its definition, and the same bits in
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
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.testing.tolerances import relative_error
from fusedmoe.tuning.cuda_tiles import CudaDecodeTiles, CudaRowsTile
from gpu_marks import needs_hopper

pytestmark = [pytest.mark.gpu, needs_hopper]

# format, experts, picks, H, I, tokens; slots that share a block
CASES = {
    "rows_as_they_lie": ("mxfp4", 16, 4, 2880, 320, 9, 8),
    "swizzled": ("mxfp4", 16, 4, 1024, 256, 9, 8),
    "parts_of_rows": ("mxfp4", 4, 2, 256, 8192, 9, 8),
    "sixteen": ("mxfp4", 4, 2, 1024, 768, 29, 16),
    "sixteen_in_parts": ("mxfp4", 4, 2, 256, 8192, 29, 16),
    "lone": ("mxfp4", 96, 4, 512, 256, 5, 1),
    "lone_in_one_piece": ("mxfp4", 32, 4, 2880, 320, 2, 1),
    "int4_groups_of_32": ("int4_g32", 16, 4, 7168, 256, 9, 8),
    "int4_groups_of_128": ("int4_g128", 16, 4, 2048, 768, 9, 8),
    "int4_few_slots": ("int4_g128", 32, 4, 2048, 768, 9, 8),
    "int4_few_slots_in_parts": ("int4_g128", 8, 2, 512, 14336, 6, 8),
    "int4_in_parts": ("int4_g128", 4, 2, 512, 14336, 9, 8),
    "int4_sixteen_in_parts": ("int4_g128", 4, 2, 4096, 14336, 29, 16),
    "int4_lone": ("int4_g32", 96, 4, 2048, 768, 5, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    if missing_gluon():
        pytest.skip("needs Hopper's experts")
    fmt_name, e, K, H, I, T, slots = CASES[name]  # noqa: E741
    torch.manual_seed(0)
    act, fmt = MoEActivation.SWIGLUOAI, format_named(fmt_name)

    def weight(shards, N, D):
        values = torch.randn(e, shards * N, D, device="cuda") / D**0.5
        return quantize(values, fmt, shards=shards, interleaved=shards == 2)

    w1, w2 = weight(2, I, H), weight(1, H, I)
    ids = torch.stack([torch.randperm(e, device="cuda")[:K] for _ in range(T)]).int()
    ids[0, 0], ids[-1, -1] = -1, e + 3
    R, programs = T * K, multiprocessors_of(torch.device("cuda"))
    tiles = decode_tiles_for(R, w1, w2, lone_slots(T, K, e, e), programs)
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
        function(LayerTensors(x, w1, w2, picked, ids, out, act_rows, y, programs, act, **biases))
        outs.append(out)
    expected, found, *others = outs
    others_rows = [row for row in range(T) if row != 1]
    assert found[1].isnan().all()
    assert relative_error(found[others_rows], expected[others_rows].double()).frobenius < 4e-3
    assert all(one[others_rows].equal(found[others_rows]) for one in others)


def test_the_same_bits_where_programs_change_blocks():
    """A place of the ring was given back while scales of it were still being read, behind the rows
    of x of a next block: other bits in one run of 25."""
    if missing_gluon():
        pytest.skip("needs Hopper's experts")
    e, K, H, I, T = 32, 2, 4096, 3584, 256  # noqa: E741
    torch.manual_seed(0)
    fmt = format_named("int4_g128")
    w1, w2 = (
        quantize(torch.randn(e, n, d, device="cuda") / d**0.5, fmt, shards=shards)
        for shards, n, d in ((2, 2 * I, H), (1, H, I))
    )
    ids = (torch.arange(T * K, device="cuda") % e).view(T, K).int()
    x, picked = torch.randn(T, H, device="cuda").bfloat16(), torch.rand(T, K, device="cuda")
    act_rows = torch.empty(T * K, I, device="cuda").bfloat16()
    y, out = torch.empty(T * K, H, device="cuda"), torch.empty_like(x)
    tiles = CudaDecodeTiles(
        CudaRowsTile(1, 8, 1, 6, 1, 99, 16), CudaRowsTile(1, 7, 1, 6, 1, 99, 16)
    )
    found = []
    for _ in range(150):
        programs = multiprocessors_of(torch.device("cuda"))
        given = LayerTensors(x, w1, w2, picked, ids, out, act_rows, y, programs)
        quantized_decode(given, tiles=tiles)
        found.append(y.clone() if not found else y.equal(found[0]))
    assert all(found[1:])
