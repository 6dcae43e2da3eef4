"""The script behind the H200 table: it goes on where it stopped and says honestly what was met."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fusedmoe.bench import LayerShape, ceilings
from fusedmoe.bench.problems import Cell

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = LayerShape("tiny", 4, 2, 32, 16)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(ceilings, "_ELEMENTS", {"cpu": 1 << 12})
    monkeypatch.setattr(ceilings, "_MATMUL", {"cpu": 64})
    import h200_layer
    import h200_targets

    return h200_layer, h200_targets


def test_the_table_holds_every_target_and_every_cell_once(scripts):
    layer, targets = scripts
    cells = layer.table(list(layer.SHAPES))
    assert len(cells) == len(set(cells))
    balanced = {(c.shape.name, c.T) for c in cells if c.routing == "balanced"}
    assert {(t.shape, T) for t in targets.TARGETS for T in t.tokens} <= balanced
    skewed = {(c.shape.name, c.T) for c in cells if c.routing == targets.SKEWED}
    assert skewed <= balanced
    given = {(c.shape.name, c.T) for c in cells if c.scope == "experts"}
    known = json.loads(targets.PEER_CELLS.read_text())
    assert given == {(shape, T) for shape in known["shapes"] for T in known["tokens"]}
    assert all(len(v) == len(known["tokens"]) for s in known["shapes"].values() for v in s.values())
    assert "torch_mm" in layer.peers_of(cells[-1]) or cells[-1].scope == "experts"


def test_it_goes_on_where_it_stopped(scripts, tmp_path, monkeypatch, capsys):
    layer, _ = scripts
    cells = [Cell(TINY, torch.bfloat16, "balanced", T) for T in (1, 2, 8)]
    monkeypatch.setattr(layer, "table", lambda shapes: cells)
    out = tmp_path / "deep" / "table.json"
    words = ["h200_layer.py", "--out", str(out), "--device", "cpu", "--repeats", "1"]
    words += ["--experts", "torch", "--least-read", "0", "--least-rate", "0"]
    monkeypatch.setattr(sys, "argv", [*words, "--seconds", "0"])
    layer.main()
    record = json.loads(out.read_text())
    assert record["cells"] == [str(cells[0])] or record["cells"] == []
    monkeypatch.setattr(sys, "argv", words)
    layer.main()
    layer.main()
    record = json.loads(out.read_text())
    assert record["cells"] == [str(cell) for cell in cells]
    assert len(record["runs"]) == 3
    assert {row["run"] for row in record["rows"]} <= {0, 1}
    names = [(row["T"], row["impl"]) for row in record["rows"]]
    assert len(names) == len(set(names)) == 3 * 6
    assert out.with_suffix(".csv").read_text().count("\n") == len(names) + 1
    assert out.with_suffix(".png").exists()
    assert "own paths: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--again", "--tokens", "2"])
    layer.main()
    again = json.loads(out.read_text())
    assert sorted(again["cells"]) == sorted(record["cells"])
    assert len(again["rows"]) == len(names)
    assert {row["run"] for row in again["rows"] if row["T"] == 2} == {3}
    assert 3 not in {row["run"] for row in again["rows"] if row["T"] != 2}


def test_cells_of_another_gpu_take_the_places_of_theirs(scripts, tmp_path, monkeypatch, capsys):
    layer, _ = scripts

    def write(name: str, us: float, *tokens: int) -> str:
        cells = [str(Cell(layer.SHAPES["mixtral"], torch.bfloat16, "balanced", T)) for T in tokens]
        header = {"runs": [{"bf16_tflops": 700.0}], "cells": cells, "device": name}
        rows = [row("fusedmoe", us, T=T) for T in tokens]
        notes = [f"{cell}: of {name}" for cell in cells]
        layer.BenchReport(header, rows, notes).write(tmp_path / name)
        return str(tmp_path / name)

    out, other = write("one.json", 100.0, 1, 4096), write("other.json", 90.0, 1, 8)
    monkeypatch.setattr(layer, "draw", lambda record, path: None)
    monkeypatch.setattr(sys, "argv", ["h200_layer.py", "--out", out, "--join", other])
    layer.main()
    record = json.loads(Path(out).read_text())
    assert [(one["T"], one["us"], one["run"]) for one in record["rows"]] == [
        *((4096, 100.0, 0), (1, 90.0, 1), (8, 90.0, 1)),
    ]
    assert [note.split("of ")[1] for note in record["notes"]] == ["one.json", *["other.json"] * 2]
    assert (record["device"], len(record["runs"]), len(record["cells"])) == ("one.json", 2, 3)
    assert {one["T"] for one in record["targets"]} == {1, 8, 4096}
    assert Path(out).with_suffix(".csv").read_text().count("\n") == 4


def test_a_slow_machine_is_thrown_away(scripts, tmp_path, monkeypatch):
    layer, _ = scripts
    out = tmp_path / "table.json"
    words = ["h200_layer.py", "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*words, "--least-read", "1e9"])
    with pytest.raises(SystemExit, match="thrown away, this machine is slow: read_gbs"):
        layer.main()
    assert not out.exists()


def row(impl: str, us: float, **changes: object) -> dict[str, object]:
    values = {
        "impl": impl, "shape": "mixtral", "routing": "balanced", "T": 4096, "scope": "layer",
        "us": us, "fraction_of_limit": 0.5, "tflops": 1000.0 / us, "run": 0, "error": 2e-3,
    }  # fmt: skip
    return values | changes


def test_verdicts(scripts):
    """Mixtral T=4096 asks for 715 TFLOP/s or 0.97 of dense; here ours has 1000 / us."""
    _, targets = scripts
    rows = [
        row("fusedmoe", 2.0),
        row("fusedmoe:triton", 2.02),
        row("transformers_grouped_mm", 4.0),
        row("torch_grouped_mm_alone", 1.9, scope="gemms"),
        row("torch_mm", 1.0, scope="dense"),
        row("fusedmoe", 2.1, routing="power_law_1.2"),
        row("fusedmoe", 150.0, T=1),
        row("fusedmoe", 150.0, T=2, error=2.1e-3),
        row("fusedmoe:triton", 150.0, T=2, error=2.0e-3),
        row("fusedmoe", 999.0, T=64, fraction_of_limit=0.96),
        row("fusedmoe", 500.0, T=64, scope="experts", routing="uniform"),
        row("fusedmoe", 650.0, T=8, scope="experts", routing="uniform", fraction_of_limit=0.98),
        row("fusedmoe", 579.0, T=1, scope="experts", routing="uniform"),
    ]
    found = {
        (one.what, one.routing, one.T): one
        for one in targets.verdicts(rows, [{"bf16_tflops": 510.0}])
    }
    assert {key: one.met for key, one in found.items()} == {
        ("target", "balanced", 1): True,
        ("target", "balanced", 64): False,
        ("target", "balanced", 4096): True,  # 500 of 510
        ("skew", "power_law_1.2", 4096): True,
        ("peers", "balanced", 4096): False,
        ("own paths", "balanced", 4096): True,
        ("own paths", "balanced", 2): True,
        ("accuracy", "balanced", 4096): True,
        ("accuracy", "balanced", 2): False,
        ("measured peers", "uniform", 1): False,
        ("measured peers", "uniform", 8): True,
        ("measured peers", "uniform", 64): True,
    }
    assert found["peers", "balanced", 4096].detail == "torch_grouped_mm_alone"
    assert "50.0% of the 1000" in found["target", "balanced", 4096].detail
    (missed,) = targets.verdicts([row("fusedmoe", 2.0)], [{"bf16_tflops": 700.0}])
    assert not missed.met
