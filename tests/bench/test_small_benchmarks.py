"""Scripts under benchmarks/ run from end to end, at toy sizes on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from fusedmoe.bench import ceilings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = {
    "gate": "--sizes 64x8 --tokens 1 3 --device cpu --repeats 1",
    "batch_invariant": "--shapes tiny --tokens 1 3 --device cpu --repeats 1",
    "shared_experts": "--models tiny --tokens 1 3 --device cpu --repeats 1",
    "model_generate": "--tiny --device cpu --layers 1 --batches 1 --new-tokens 2 --prompt-tokens 4 "
    "--repeats 1",
}
ROWS = {"gate": 2 * 2 * 2 * 3, "batch_invariant": 4, "shared_experts": 8, "model_generate": 3}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_writes_its_rows(name, tmp_path, monkeypatch):
    from fusedmoe.bench import SHAPES, LayerShape

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(ceilings, "_ELEMENTS", {"cpu": 1 << 12})
    monkeypatch.setattr(ceilings, "_MATMUL", {"cpu": 64})
    monkeypatch.setitem(SHAPES, "tiny", LayerShape("tiny", 8, 2, 64, 32))
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SCRIPTS[name].split(), "--out", str(out)])
    module = importlib.import_module(name)
    try:
        module.main()
    finally:
        sys.modules.pop(name)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == ROWS[name]
    speed = "tokens_per_s" if name == "model_generate" else "us"
    assert all(row[speed] > 0 for row in rows)


def test_another_batch_size_is_appended(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    out = tmp_path / "result.json"
    words = ["model_generate.py", *SCRIPTS["model_generate"].split(), "--out", str(out), "--append"]
    words += ["--implementations", "fusedmoe"]
    module = importlib.import_module("model_generate")
    for batch in ("2", "1", "2"):
        monkeypatch.setattr(sys, "argv", [*words, "--batches", batch])
        module.main()
    sys.modules.pop("model_generate")
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["impl"]) for row in rows] == [
        (1, "transformers_grouped_mm"),
        (1, "fusedmoe"),
        (2, "transformers_grouped_mm"),
        (2, "fusedmoe"),
    ]
