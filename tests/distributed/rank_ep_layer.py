"""The benchmark of whole layers over ranks, at toy size; runs inside a RankPool."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from unittest import mock

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def run_script(words: list[str]) -> None:
    with mock.patch.object(sys, "argv", ["ep_layer.py", *words]):
        with mock.patch.object(sys, "path", [BENCHMARKS, *sys.path]):
            module = importlib.import_module("ep_layer")
        module.main()
