"""The kernels of packed formats compile for Hopper without a GPU, within its memory."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_they_compile_as_they_are_launched():
    pytest.importorskip("triton")
    paths = f"{TESTS.parent / 'src'}:{TESTS}"
    done = subprocess.run(
        [sys.executable, str(TESTS / "compile_packed_formats.py")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHONPATH": paths},
        timeout=300,
    )
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]
