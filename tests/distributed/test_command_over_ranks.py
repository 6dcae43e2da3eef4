"""The command line under torchrun, and in the processes that it would start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rank_command
from folders import write_folders
from writers import CASES

from fusedmoe.presets import write_preset

pytest.importorskip("transformers")
SOURCE = Path(__file__).resolve().parents[2] / "src"
NEW = ("--max-new-tokens", "3", "--device", "cpu", "--json")


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


def on_ranks(ranks, *argv) -> str:
    """What the command prints: rank 0 alone."""
    (code, out, err), *others = ranks.run(rank_command.run, tuple(map(str, argv)))
    assert code == 0, err
    assert [(code, out) for code, out, _ in others] == [(0, "")] * 3
    return out


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_preset("tiny-qwen3-moe", tmp_path_factory.mktemp("checkpoint") / "qwen")


def test_generate_with_experts_over_ranks(ranks, qwen):
    whole = json.loads(on_ranks(ranks, "generate", qwen, *NEW, "--ep", "--compare"))
    assert whole["tokens_agree"] is True
    own = json.loads(on_ranks(ranks, "generate", qwen, *NEW, "--ep"))
    assert whole["route"] == own["route"] == "accelerate"
    assert own["runs"][-1]["tokens"] == whole["runs"][0]["tokens"]
    assert len(own["runs"][-1]["tokens"]) == 3


@pytest.mark.parametrize("words", [("--quantize", "int8"), ()])
def test_generate_with_packed_experts_over_ranks(ranks, words, tmp_path, capsys):
    from fusedmoe.cli import main

    folders = write_folders(tmp_path, "tiny-qwen3-moe", CASES["ct w4a16"])
    argv = ("generate", folders.floats if words else folders.packed, *words, *NEW)
    assert main([str(word) for word in argv]) == 0
    alone = json.loads(capsys.readouterr().out)["runs"][-1]["tokens"]
    found = json.loads(on_ranks(ranks, *argv, "--ep"))["runs"][-1]["tokens"]
    assert found == alone
    for code, _, err in ranks.run(rank_command.run, (*map(str, argv), "--tp")):
        assert code == 2
        assert "spread with --ep" in err


def test_generate_by_the_models_own_plan():
    common = ("generate", "--preset", "tiny-qwen3-moe", *NEW, "--compare")
    done = torchrun(*common, "--tp")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["tokens_agree"] is True


def test_bench_under_torchrun(tmp_path):
    sizes = ("--num-experts", "8", "--top-k", "2", "--hidden-size", "32")
    more = ("--intermediate-size", "16", "--tokens", "1", "5", "--dtypes", "fp32")
    output = tmp_path / "ranks.json"
    words = ("--repeats", "2", "--device", "cpu", "--ep", "--output", str(output))
    done = torchrun("bench", *sizes, *more, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * 2 * 3  # ways, token counts, scopes
    assert {row["scope"] for row in rows} == {"layer", "dispatch", "combine"}
    assert all(row["ranks"] == 2 and row["E"] == 4 and row["us"] > 0 for row in rows)
    assert done.stdout.count("naive_dp_ep") == 6
    assert "note: peer: needs GPUs" in done.stdout  # one rank has printed


def test_bench_with_fewer_experts_than_ranks(ranks):
    sizes = ("--num-experts", "3", "--top-k", "2", "--hidden-size", "32")
    more = ("--intermediate-size", "16", "--tokens", "2", "--dtypes", "fp32", "--repeats", "1")
    words = ("bench", "--ep", *sizes, *more, "--device", "cpu", "--json")
    rows = json.loads(on_ranks(ranks, *words))["rows"]
    assert [row["E"] for row in rows] == [1] * 6  # on rank 0


def test_bench_over_ranks_says_that_it_measures_floats(ranks, tmp_path):
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"]).packed
    words = ("--tokens", "1", "--dtypes", "fp32", "--repeats", "1", "--device", "cpu", "--json")
    notes = json.loads(on_ranks(ranks, "bench", folder, "--ep", *words))["notes"]
    assert any(note.endswith("as int4_g32; floats of their shape were measured") for note in notes)


@pytest.mark.parametrize("option", ["--ep", "--tp"])
def test_several_processes_need_torchrun(option, qwen, capsys, monkeypatch):
    from fusedmoe.cli import main

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["generate", str(qwen), option]) == 2
    assert "torchrun" in capsys.readouterr().err
