"""The command line in processes that are a group already; runs inside a RankPool."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch.distributed as dist


def run(argv: tuple[str, ...]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one rank."""
    from fusedmoe.cli import main

    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(dist.get_world_size()))
        patch.setenv("RANK", str(dist.get_rank()))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(list(argv))
    return code, output.getvalue(), errors.getvalue()
