"""The tuner on a GPU: real compilers, real times, a table that the layer then uses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fusedmoe.bench.shapes import LayerShape
from fusedmoe.experts.functional import fused_experts

pytestmark = pytest.mark.gpu
SHAPE = LayerShape("small", 16, 4, 256, 384)


def test_a_small_layer_is_tuned_and_uses_its_table(tmp_path: Path) -> None:
    from fusedmoe import MoEOptions
    from fusedmoe.tuning.choice import device_facts
    from fusedmoe.tuning.tuner.measure import GpuTimer
    from fusedmoe.tuning.tuner.precompile import compilers
    from fusedmoe.tuning.tuner.run import compare, tune

    device, dtype = torch.device("cuda"), torch.bfloat16
    facts = device_facts(device)
    with compilers(2) as workers:
        timer = GpuTimer(SHAPE, dtype, device, workers)
        table = tune(SHAPE, dtype, facts, timer, (1, 64), tmp_path / "journal").table
    assert table.device == facts.name
    assert all(0 < us < 1e4 for curve in table.curves for us in curve.cost)
    ceilings = {"read_gbs": 4000.0, "bf16_tflops": 700.0}
    rows = compare(SHAPE, dtype, facts, timer, table, (1, 3, 64), ceilings)
    assert [row["T"] for row in rows] == [1, 1, 3, 3, 64, 64]
    assert all(math.isfinite(row["loss"]) for row in rows)

    problem, weights = timer.problem(64), timer.weights[0]
    given = (problem.x, weights.w1, weights.w2, *problem.situations[0][1:])
    forced = MoEOptions(experts="triton", tuned_table=table)
    out = fused_experts(*given, options=forced)
    expected = fused_experts(*given, options=MoEOptions(experts="torch"))
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_a_tile_that_does_not_fit_is_refused_and_the_rest_measured() -> None:
    from fusedmoe.tuning.tiles import TileConfig
    from fusedmoe.tuning.tuner.measure import GpuTimer

    timer = GpuTimer(SHAPE, torch.bfloat16, torch.device("cuda"))
    good, huge = TileConfig(16, 64, 64, 1, 4, 3), TileConfig(128, 128, 256, 1, 8, 6)
    first, second = timer.time("gemm1", 8, [huge, good], 3)
    assert math.isinf(first)
    assert 0 < second < 1e4
