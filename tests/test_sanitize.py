"""What tools/sanitize.py runs by name, and in parts; its kernels need a GPU."""

import importlib.util
from itertools import chain
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "tools" / "sanitize.py"
SIZES = {"quantized": 2, "packed": 2}


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("sanitize", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return module


@pytest.mark.parametrize("names", [["bounded"], ["slots", "packed"], []])
def test_what_is_named_runs_and_without_names_all(tool, names, monkeypatch):
    ran = []
    for name in tool.PARTS:
        monkeypatch.setattr(tool, name, lambda *given, name=name: ran.append(name))
    tool.main([*["--only"] * bool(names), *names])
    wanted = names or [*tool.PARTS]
    assert ran == [name for name in wanted for _ in range(SIZES.get(name, 1))]


def test_sizes_can_be_run_in_parts(tool, monkeypatch):
    ran = []
    monkeypatch.setattr(tool, "quantized", lambda *given: ran.append(given))
    for part in "01":
        tool.main(["--only", "quantized", "--part", part, "2", "--formats", "nvfp4"])
    assert ran == [(288, 160, ["nvfp4"]), (256, 256, ["nvfp4"])]


def test_parts_have_everything_once(tool):
    parts = [tool.share(range(11), (i, 4)) for i in range(4)]
    assert sorted(chain(*parts)) == list(range(11))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
