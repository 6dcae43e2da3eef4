from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fusedmoe.cli import main

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command in this process; returns its exit code, stdout and stderr."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny-mixtral checkpoint folder; tests that break it copy it first."""
    from fusedmoe.presets import write_preset

    return write_preset("tiny-mixtral", tmp_path_factory.mktemp("checkpoints") / "mixtral")
