"""The benchmarks of whole layers over ranks, at toy size; runs inside a RankPool."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from unittest import mock

from fusedmoe.bench import ceilings

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def run_script(name: str, words: list[str]) -> None:
    with mock.patch.object(sys, "path", [BENCHMARKS, *sys.path]):
        module = importlib.import_module(name)
    with (
        mock.patch.object(sys, "argv", [f"{name}.py", *words]),
        mock.patch.object(ceilings, "_ELEMENTS", {"cpu": 1 << 12}),
        mock.patch.object(ceilings, "_MATMUL", {"cpu": 64}),
        mock.patch.object(module, "OVERLAP_FROM", 40, create=True),
    ):
        module.main()
