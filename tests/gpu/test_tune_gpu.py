"""The tuner on a GPU: real compilers, real times, a table that the layer then uses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fusedmoe.bench.shapes import LayerShape
from fusedmoe.config import MoEOptions
from fusedmoe.experts.functional import fused_experts

pytestmark = pytest.mark.gpu
SHAPE = LayerShape("small", 16, 4, 256, 384)


@pytest.mark.parametrize("kernel", ["triton", "hopper"])
def test_a_small_layer_is_tuned_and_uses_its_table(kernel: str, tmp_path: Path) -> None:
    from fusedmoe.tuning.choice import device_facts
    from fusedmoe.tuning.tuner.measure import GpuTimer
    from fusedmoe.tuning.tuner.precompile import compilers
    from fusedmoe.tuning.tuner.run import TUNABLES, compare, tune

    if kernel == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    layer, device = TUNABLES[kernel](SHAPE, torch.bfloat16), torch.device("cuda")
    facts = device_facts(device)
    with compilers(8) as workers:
        timer = GpuTimer(layer, device, workers)
        table = tune(layer, facts, timer, (1, 64), tmp_path / "journal").table
    assert (table.device, table.kernel) == (facts.name, kernel)
    finite = [us for curve in table.curves for us in curve.cost if math.isfinite(us)]
    assert all(0 < us < 1e4 for us in finite)
    assert kernel == "hopper" or len(finite) == len(table.curves) * len(table.tokens)
    ceilings = {"read_gbs": 4000.0, "bf16_tflops": 700.0}
    rows = compare(layer, facts, timer, table, (1, 3, 64), ceilings)
    assert [row["T"] for row in rows] == [1, 1, 3, 3, 64, 64]
    assert all(math.isfinite(row["loss"]) for row in rows)

    problem, weights = timer.problem(64), timer.weights[0]
    given = (problem.x, weights.w1, weights.w2, *problem.situations[0][1:])
    options = MoEOptions(experts=kernel, tuned_table=table)
    out = fused_experts(*given, options=options)
    expected = fused_experts(*given, options=MoEOptions(experts="torch"))
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert explain_of(MoEOptions(tuned_table=table)) == kernel


def explain_of(options: MoEOptions) -> str:
    """What selection takes for the layer: the experts that the table is for."""
    from fusedmoe import explain
    from fusedmoe.activation import MoEActivation
    from fusedmoe.config import FusedMoEConfig

    config = FusedMoEConfig(
        num_experts=SHAPE.E,
        num_local_experts=SHAPE.E,
        experts_per_token=SHAPE.k,
        hidden_dim=SHAPE.H,
        intermediate_size_per_partition=SHAPE.I,
        activation=MoEActivation.SILU,
        in_dtype=torch.bfloat16,
        device=torch.device("cuda"),
        options=options,
    )
    return explain(config).chosen.name


def test_compiled_layers_take_tables() -> None:
    """The operator gets the table as text, and scratch for whatever it chooses."""
    from fusedmoe import FusedMoE
    from fusedmoe.tuning.hopper_tiles import PrefillTiles, decode_tiles_of
    from fusedmoe.tuning.table_file import make_table
    from fusedmoe.tuning.tuned_kernels import HOPPER
    from fusedmoe.tuning.tuned_table import Curve, LayerKey

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    table = make_table(
        device="NVIDIA_H200",
        kernel="hopper",
        kernel_version=HOPPER.version,
        triton=None,
        layer=LayerKey(E=16, K=4, H=256, I=384, weights="bf16", form="halves"),
        tokens=(1, 32, 512),
        curves=(
            Curve("layer", decode_tiles_of(64, 64, 128), (1.0, 2.0, math.inf)),
            Curve("layer", PrefillTiles(group=8), (math.inf, 5.0, 5.0)),
        ),
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        layer = FusedMoE(16, 4, 256, 384, torch.bfloat16, options=MoEOptions(tuned_table=table))
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, 0.05)
        compiled = torch.compile(layer, dynamic=True)
        for T in (300, 40, 5, 2):
            x = torch.randn(T, 256, device="cuda").bfloat16()
            logits = torch.randn(T, 16, device="cuda")
            assert compiled(x, logits).equal(layer(x, logits)), T


def test_a_tile_that_does_not_fit_is_refused_and_the_rest_measured() -> None:
    from fusedmoe.tuning.tiles import TileConfig
    from fusedmoe.tuning.tuner.measure import GpuTimer
    from fusedmoe.tuning.tuner.triton_layer import TritonLayer

    timer = GpuTimer(TritonLayer(SHAPE, torch.bfloat16), torch.device("cuda"))
    good, huge = TileConfig(16, 64, 64, 1, 4, 3), TileConfig(128, 128, 256, 1, 8, 6)
    first, second = timer.time("gemm1", 8, [huge, good], 3)
    assert math.isinf(first)
    assert 0 < second < 1e4
