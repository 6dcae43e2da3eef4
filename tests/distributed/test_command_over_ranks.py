"""The command line under torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SOURCE = Path(__file__).resolve().parents[2] / "src"


def torchrun(*argv: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    paths = [str(SOURCE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), "-m", "fusedmoe.cli", *argv),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=150,
    )


GENERATE = ("generate", "--preset", "tiny-qwen3-moe", "--device", "cpu", "--compare", "--json")


def test_generate_with_experts_over_ranks():
    done = torchrun(*GENERATE, "--max-new-tokens", "6", "--ep")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout)  # one rank has printed
    assert record["tokens_agree"] is True
    assert len(record["runs"][-1]["tokens"]) == 6


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs accelerate")
def test_generate_by_the_models_own_plan():
    done = torchrun(*GENERATE, "--max-new-tokens", "6", "--tp")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["tokens_agree"] is True


def test_bench_over_ranks(tmp_path):
    sizes = ("--num-experts", "8", "--top-k", "2", "--hidden-size", "32")
    more = ("--intermediate-size", "16", "--tokens", "1", "5", "--dtypes", "fp32")
    output = tmp_path / "ranks.json"
    words = ("--repeats", "2", "--device", "cpu", "--ep", "--output", str(output))
    done = torchrun("bench", *sizes, *more, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * 2 * 2  # ways, token counts, scopes
    assert {row["scope"] for row in rows} == {"layer", "dispatch_combine"}
    assert all(row["ranks"] == 2 and row["E"] == 4 and row["us"] > 0 for row in rows)
    assert done.stdout.count("naive_dp_ep") == 4


@pytest.mark.parametrize("option", ["--ep", "--tp"])
def test_several_processes_need_torchrun(option, capsys, monkeypatch):
    from fusedmoe.cli import main

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main([*GENERATE, option]) == 2
    assert "torchrun" in capsys.readouterr().err
