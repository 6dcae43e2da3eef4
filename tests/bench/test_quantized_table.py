"""The script behind the quantized table says honestly what was met, in the file itself."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from fusedmoe.bench import LayerShape
from fusedmoe.bench.replays import Replays

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quantized_layer
    import quantized_targets

    return quantized_layer, quantized_targets


def row(fmt: str, us: float, **changes: object) -> dict[str, object]:
    """One of Qwen3-30B, 8192 tokens, of which ours has 1e6 / us TFLOP/s here."""
    values = {
        "impl": "fusedmoe", "shape": "qwen3-30b", "format": fmt, "routing": "balanced", "T": 8192,
        "scope": "layer", "us": us, "fraction_of_limit": 0.5, "tflops": 1e6 / us,
    }  # fmt: skip
    return values | changes


def test_every_target_is_a_cell_and_wider_scales_are_measured_wherever_blocks_are(scripts):
    _, targets = scripts
    asked = targets.cells_asked()
    for target in targets.TARGETS:
        cells = asked[target.shape, target.format]
        assert {targets.Cell("balanced", "layer", T) for T in target.tokens} <= set(cells)
        if target.format == targets.BLOCK:
            layers = [cell for cell in cells if cell.scope == "layer"]
            for fmt in targets.BESIDE_BLOCK:
                beside = asked[target.shape, fmt]
                assert layers == [cell for cell in beside if cell.scope == "layer"]


def test_verdicts(scripts):
    _, targets = scripts
    peer = min(one[0] for one in targets.peer_cells()["bits"]["8"]["qwen3-30b"].values())
    rows = [
        row("fp8_block", 1000.0),
        row("fp8_block", 1111.0, impl="fusedmoe:triton_quantized"),
        row("fp8_block", 1120.0, routing="power_law_1.2"),
        row("fp8_channel", 900.0),
        row("fp8_tensor", 920.0),
        row("fp8_block", 18.0, T=1),
        row("fp8_block", peer * 0.98, T=1, scope="experts", routing="uniform"),
    ]
    found = targets.verdicts(rows)
    assert {(one.what, one.format, one.T): one.met for one in found} == {
        ("target", "fp8_block", 8192): True,  # 1000 of 850: the faster of two counts
        ("target", "fp8_block", 1): False,  # 17
        ("beside blocks", "fp8_channel", 8192): True,
        ("beside blocks", "fp8_tensor", 8192): False,
        ("skew", "fp8_block", 8192): False,
        ("measured peers", "fp8_block", 1): False,  # 0.97
    }
    (close,) = targets.verdicts([rows[-1] | {"fraction_of_limit": 0.97}])
    assert close.met


def test_a_report_names_what_was_asked_and_lies_beside_a_csv_and_a_picture(
    scripts, tmp_path, monkeypatch, capsys
):
    layer, _ = scripts
    out = tmp_path / "quantized.json"
    recorded = json.loads((BENCHMARKS / "results/h200/quantized.json").read_text())
    recorded["rows"] = recorded["rows"][:3]
    recorded["targets"] = ["old"]
    out.write_text(json.dumps(recorded))
    monkeypatch.setattr(sys, "argv", ["quantized_layer.py", "--only-report", "--out", str(out)])
    layer.main()
    written = json.loads(out.read_text())
    assert written["rows"] == recorded["rows"]
    assert written["command"] == recorded["command"]
    assert written["targets"] != ["old"]
    assert out.with_suffix(".csv").read_text().count("\n") == 4
    assert str(sum(one["met"] for one in written["targets"])) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["quantized_layer.py", "--only-report"])
    with pytest.raises(SystemExit):
        layer.main()


def test_rows_of_another_run_take_the_places_of_theirs(scripts):
    script, _ = scripts

    def report(commit: str, *rows: dict[str, object]):
        names = ("date", "command", "read_gbs", "copy_gbs", "bf16_tflops")
        header = dict.fromkeys((*names, "fp8_tflops", "int8_tops"), 1.0) | {"commit": commit}
        return script.BenchReport(header, list(rows))

    table = report("old", row("mxfp4", 3.0), row("int4_g128", 4.0))
    script.take_in(table, report("new", row("mxfp4", 2.0)))
    script.take_in(table, report("newer", row("fp8_block", 1.0)))
    assert {one["format"]: (one["us"], one["run"]) for one in table.rows} == {
        "int4_g128": (4.0, 0),
        "mxfp4": (2.0, 1),
        "fp8_block": (1.0, 2),
    }
    assert [run["commit"] for run in table.header["runs"]] == ["old", "new", "newer"]
    assert table.header["commit"] == "newer"


def test_a_layer_is_measured_row_by_row(scripts, monkeypatch, capsys):
    script, targets = scripts
    monkeypatch.setattr(script, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(script, "record", lambda calls, limit, repeats: Replays(calls, 1, repeats))
    monkeypatch.setattr(
        script, "time_in_turns", lambda found, rest: {name: [2.0] for name in found}
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    table = script.BenchReport({"read_gbs": 1.0, "bf16_tflops": 1.0})
    cells = [targets.Cell("balanced", "layer", 3), targets.Cell("uniform", "experts", 2)]
    shape = LayerShape("tiny", 8, 2, 128, 128)
    with torch.inference_mode():
        script.measure(shape, "int4_g128", cells, [None], table)
    assert [(row["routing"], row["scope"], row["T"], row["us"]) for row in table.rows] == [
        ("balanced", "layer", 3, 2.0),
        ("uniform", "experts", 2, 2.0),
    ]
    assert all(0 < row["error"] < 1e-2 and row["active_experts"] <= 6 for row in table.rows)
    assert capsys.readouterr().out.count("\n") == 2


def test_the_launches_of_a_layer_are_rows(scripts, monkeypatch, capsys):
    script = importlib.import_module("quantized_prefill")
    calls = {"up": (object, 3e9), "align": (object, 0.0)}
    table = script.BenchReport({})
    about = {"shape": "tiny", "format": "fp8_block", "T": 8}
    script.add_parts(table, about, calls, {"up": [1.0, 3.0, 8.0], "align": [2.0]})
    assert table.rows == [
        about | {"part": "up", "us": 3.0, "tflops": 1e3},
        about | {"part": "align", "us": 2.0, "tflops": 0.0},
    ]
