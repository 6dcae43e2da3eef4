"""The table of the rarer formats grows format by format, over as many runs as it takes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """The script on a machine that measures nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("packed_formats")
    ceilings = {"read_gbs": 4500.0, "bf16_tflops": 780.0}
    monkeypatch.setattr(module, "h200_ceilings", lambda device: ceilings)
    monkeypatch.setattr(module, "eight_bit_rates", lambda: {"fp8_tflops": 1430.0})
    monkeypatch.setattr(module, "make_header", lambda device, rates: HEADER | rates)
    monkeypatch.setattr(module, "measure", measured)
    yield module
    sys.modules.pop("packed_formats")


HEADER = {"commit": "abc", "command": "packed_formats.py", "date": "2026-01-01"}


def measured(shape, name, cells, experts, report):
    report.rows += [{"shape": shape.name, "format": name, "T": cell.T} for cell in cells]


def run(module, monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["packed_formats.py", *words])
    module.main()


def test_what_is_measured_is_kept_and_left_out(script, monkeypatch, tmp_path):
    out = str(tmp_path / "table.json")
    run(script, monkeypatch, "--formats", "q4_k", "nf4", "--tokens", "1", "8", "--out", out)
    first = json.loads(Path(out).read_text())
    run(script, monkeypatch, "--append", "--formats", "nf4", "mxfp8", "--tokens", "1", "--out", out)
    both = json.loads(Path(out).read_text())
    assert both["rows"][:4] == first["rows"]
    assert [(row["format"], row["T"], row["run"]) for row in both["rows"]] == [
        *(("q4_k", 1, 0), ("q4_k", 8, 0), ("nf4", 1, 0), ("nf4", 8, 0), ("mxfp8", 1, 1)),
    ]
    assert [one["fp8_tflops"] for one in both["runs"]] == [1430.0, 1430.0]
    assert Path(out).with_suffix(".csv").read_text().count("\n") == 6


def test_going_on_needs_a_file_and_compiling_measures_nothing(script, monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "--append")
    ran = []
    monkeypatch.setattr(script, "run_once", lambda shape, name, *rest: ran.append(name))
    out = tmp_path / "table.json"
    run(script, monkeypatch, "--warm", "--formats", "q6_k", "--out", str(out))
    assert ran == ["q6_k"]
    assert not out.exists()


def test_every_format_of_the_table_has_a_name_that_is_known(script):
    from fusedmoe.quantization.formats import format_named

    recorded = json.loads((BENCHMARKS / "results/h200/packed_formats.json").read_text())["rows"]
    assert {row["format"] for row in recorded} == set(script.FORMATS)
    for name in script.FORMATS:
        assert format_named(name.partition("_by_")[0])
    assert all(row["error"] <= 4.1e-3 for row in recorded if "_by_" not in row["format"])
    assert all(
        row["error"] <= 1.05 * row["rounding_error"] for row in recorded if "_by_" in row["format"]
    )
