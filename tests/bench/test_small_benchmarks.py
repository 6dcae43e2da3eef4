"""Scripts under benchmarks/ run from end to end, at toy sizes on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fusedmoe.bench import SHAPES, LayerShape, ceilings
from fusedmoe.experts import hopper

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = {
    "gate": "--sizes 64x8 --tokens 1 3 --device cpu --repeats 1",
    "batch_invariant": "--shapes tiny --tokens 1 3 --device cpu --repeats 1",
    "shared_experts": "--models tiny --tokens 1 3 --device cpu --repeats 1",
    "model_generate": "--tiny --device cpu --layers 1 --batches 1 --new-tokens 2 --prompt-tokens 4 "
    "--repeats 1",
    "hopper_variants": "--cells tiny:3 tiny/2:3 --only direct --rounds 1",
}
ROWS = {"gate": 2 * 2 * 2 * 3, "batch_invariant": 4, "shared_experts": 8, "model_generate": 3}
ROWS["hopper_variants"] = 4
TINY = LayerShape("tiny", 8, 2, 64, 32)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_writes_its_rows(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(ceilings, "_ELEMENTS", {"cpu": 1 << 12})
    monkeypatch.setattr(ceilings, "_MATMUL", {"cpu": 64})
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SCRIPTS[name].split(), "--out", str(out)])
    module = importlib.import_module(name)
    if name == "hopper_variants":  # its kernels run as their definitions there
        monkeypatch.setattr(hopper, "multiprocessors_of", lambda device: 1)
        monkeypatch.setattr(hopper, "device_of", lambda tensor: nullcontext())
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
        monkeypatch.setitem(module.SHAPES, "tiny", TINY)
    try:
        module.main()
    finally:
        sys.modules.pop(name)
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert len(rows) == ROWS[name]
    assert all(report[key] > 0 for key in ("read_gbs", "copy_gbs", "bf16_tflops"))
    assert {"device", "versions", "commit", "command", "date"} <= report.keys()
    if name == "model_generate":
        assert all(row["tokens_per_s"] > 0 and row["batch"] == 1 for row in rows)
        return
    for row in rows:
        assert row["p10_us"] <= row["us"] <= row["p90_us"]
        assert {"shape", "format", "scope", "T", "E", "H", "tflops"} <= row.keys()
        assert row["fraction_of_limit"] == pytest.approx(row["limit_us"] / row["us"], abs=0.01)
        assert row["error"] < 0.02


def test_an_h200_that_is_slow_is_thrown_away(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module, device = importlib.import_module("h200_ceilings"), torch.device("cuda")
    found = {"read_gbs": 4299.0, "copy_gbs": 4000.0, "bf16_tflops": 750.0}
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, dtypes: found)
    monkeypatch.setattr(ceilings, "device_name", lambda device: "NVIDIA H200")
    with pytest.raises(SystemExit, match="read_gbs is 4299, at least 4300 is asked"):
        module.ceilings_of(device)
    monkeypatch.setattr(ceilings, "device_name", lambda device: "NVIDIA H100")
    assert module.ceilings_of(device) == found
    with pytest.raises(SystemExit, match="bf16_tflops is 750"):
        module.h200_ceilings(device, 0.0, 751.0)


def test_every_script_is_on_the_page():
    """Those that are started, by whatever has options."""
    page = (BENCHMARKS / "README.md").read_text()
    scripts = [p.name for p in BENCHMARKS.glob("*.py") if "ArgumentParser(" in p.read_text()]
    assert len(scripts) > 15
    assert [name for name in scripts if f"{name}`" not in page] == []


def test_another_batch_size_is_appended(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(ceilings, "_ELEMENTS", {"cpu": 1 << 12})
    monkeypatch.setattr(ceilings, "_MATMUL", {"cpu": 64})
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
