"""tools/sanitize_formats.py runs every format of the matrix; here one of them, on a CPU."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch

import format_matrix
from fusedmoe.experts.triton_quantized import TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_batched import BatchedTritonQuantizedExperts
from fusedmoe.kernels.cuda import quantized_launch

PATH = Path(__file__).parents[1] / "tools" / "sanitize_formats.py"


def loaded():
    spec = importlib.util.spec_from_file_location("sanitize_formats", PATH)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_a_format_runs_in_every_layer(monkeypatch, capsys):
    tool = loaded()
    assert tool.MATRIX is format_matrix.MATRIX
    on_cpu = tuple(replace(layer, device="cpu", dtype=torch.float32) for layer in tool.LAYERS)
    experts = [TritonQuantizedExperts, BatchedTritonQuantizedExperts]
    monkeypatch.setattr(tool, "LAYERS", on_cpu)
    monkeypatch.setattr(tool, "serving", lambda case: experts)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tool.run("int4_g32", None)
    assert len(capsys.readouterr().out.splitlines()) == len(on_cpu) * len(experts)


def test_every_lane_arrives_if_asked(monkeypatch):
    tool, kernel = loaded(), quantized_launch._kernel
    monkeypatch.setattr(quantized_launch, "_kernel", kernel)
    monkeypatch.setattr(tool, "MATRIX", ())
    monkeypatch.syspath_prepend(str(PATH.parent))
    for words, same in ([], True), (["--every-lane"], False):
        monkeypatch.setattr(sys, "argv", ["sanitize_formats.py", *words])
        tool.main()
        assert (quantized_launch._kernel is kernel) is same
    assert quantized_launch._kernel is importlib.import_module("sanitize_rows")._kernel
