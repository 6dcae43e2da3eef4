"""tune measures, writes and resumes; shows tables; refuses what it cannot do in one line."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedmoe.bench.problems import Cell, Problem
from fusedmoe.bench.report import Percentiles
from fusedmoe.tuning.choice import DeviceFacts
from fusedmoe.tuning.foreign import read_table
from fusedmoe.tuning.hopper_space import serves
from fusedmoe.tuning.hopper_tiles import DecodeTiles, DirectTiles, PrefillTiles
from fusedmoe.tuning.tuned_kernels import TRITON
from fusedmoe.tuning.tuner.space import predicted_us

STAGES = TRITON.stages
SIZES = ("--num-experts", "8", "--top-k", "2", "--hidden-size", "64", "--intermediate-size", "96")
NAME = "E8-K2-H64-I96-bf16-halves.json"


class ModelTimer:
    """Times by the model; ``stop_after`` calls it is interrupted."""

    def __init__(self, layer: Any, device: Any, compilers: Any) -> None:
        self.shape, self.dtype, self.tunable = layer.shape, layer.dtype, layer

    calls, stop_after = 0, 10**9

    def prepare(self, stage: str, tiles: Any) -> None:
        pass

    def time(self, stage: str, T: int, tiles: Any, samples: int) -> list[float]:
        type(self).calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        return [self.us(stage, T, tile) for tile in tiles]

    def us(self, stage: str, T: int, tile: Any) -> float:
        if stage in STAGES:
            return predicted_us(self.tunable.gemms.gemm(stage, T), tile)
        if not serves(tile, T, self.shape.k, self.shape.E):
            return math.inf
        return 0.5 * (1 + T * T) if isinstance(tile, DirectTiles) else 1.0 + T

    def problem(self, T: int) -> Problem:
        return Problem.of(Cell(self.shape, self.dtype, "uniform", T), 1, torch.device("cpu"))

    def time_layer(self, T: int, choices: Any, samples: int) -> list[Percentiles]:
        times = [
            sum(self.us(s, T, t) for s, t in zip(self.tunable.kernel.stages, tiles, strict=True))
            for tiles in choices
        ]
        return [Percentiles(us, us, us) for us in times]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[ModelTimer]:
    """An H200 that is not there."""
    facts = DeviceFacts("NVIDIA_H200", 227 * 1024, "3.6.0")

    class Timer(ModelTimer):
        pass

    monkeypatch.setattr("fusedmoe.cli.tune.device_named", lambda name: torch.device("cuda"))
    monkeypatch.setattr("fusedmoe.cli.layer_config.device_named", lambda name: torch.device("cuda"))
    monkeypatch.setattr("fusedmoe.tuning.choice.device_facts", lambda device: facts)
    monkeypatch.setattr("fusedmoe.cli.tune.make_timer", Timer)
    monkeypatch.setattr("fusedmoe.cli.tune.start_compilers", nullcontext)
    monkeypatch.setattr(
        "fusedmoe.cli.tune._header", lambda *_: {"read_gbs": 4400.0, "bf16_tflops": 790.0}
    )
    return Timer


def test_a_table_a_report_and_all_measurements(cli, gpu, tmp_path: Path) -> None:
    folder, report, log = tmp_path / "tables", tmp_path / "r.json", tmp_path / "m.json"
    words = ("tune", *SIZES, "--tokens", "1", "64", "--output", folder)
    code, out, err = cli(*words, "--report", report, "--measurements", log)
    assert code == 0, err
    assert [path.name for path in folder.iterdir()] == [NAME]
    table = read_table(folder / NAME)
    assert table.tokens == (1, 8, 64)
    rows = json.loads(report.read_text())["rows"]
    assert [(row["T"], row["tiles"]) for row in rows] == [
        (T, tiles) for T in (1, 3, 8, 23, 64) for tiles in ("table", "default")
    ]
    assert [row["measured"] for row in rows[::2]] == [True, False, True, False, True]
    assert all(row["loss"] >= -0.02 for row in rows)
    assert {one["stage"] for one in json.loads(log.read_text())["custom"]} == {"gemm1", "gemm2"}
    assert "default loses" in out
    gpu.calls = 0
    assert cli(*words)[0] == 0
    assert gpu.calls == 0, "what is there already is not measured again"
    assert cli(*words, "--again")[0] == 0
    assert gpu.calls > 0
    gpu.calls = 0
    assert cli("tune", *SIZES, "--tokens", "1", "64", "512", "--output", folder)[0] == 0
    assert gpu.calls > 0, "nothing is known of 512 tokens"
    assert read_table(folder / NAME).tokens == (1, 8, 64, 181, 512)


def test_a_hopper_gets_tables_for_the_experts_it_prefers(
    cli, gpu, monkeypatch, tmp_path: Path
) -> None:
    words = ("tune", *SIZES, "--tokens", "1", "64", "--output", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    report = tmp_path / "report.json"
    code, out, err = cli(*words, "--dtype", "bf16", "--report", report)
    assert code == 0, err
    hopper = "E8-K2-H64-I96-bf16-halves-hopper.json"
    table = read_table(tmp_path / hopper)
    assert (table.kernel, table.tokens) == ("hopper", (1, 8, 64))
    assert isinstance(table.tiles(1)[0], DirectTiles)
    assert isinstance(table.tiles(64)[0], DecodeTiles | PrefillTiles)
    rows = json.loads(report.read_text())["rows"]
    assert {row["impl"] for row in rows} == {"fusedmoe:hopper"}
    assert "direct up" in out
    assert (
        "direct up" in cli("tune", "--show", tmp_path / "E8-K2-H64-I96-bf16-halves-hopper.json")[1]
    )
    for extra, name in (
        (("--dtype", "fp32"), "E8-K2-H64-I96-fp32-halves.json"),
        (("--dtype", "bf16", "--experts", "triton"), NAME),
        (("--dtype", "bf16", "--intermediate-size", "90"), NAME.replace("96", "90")),
    ):
        assert cli(*words, *extra)[0] == 0
        assert read_table(tmp_path / name).kernel == "triton"
    code, _, err = cli(*words, "--dtype", "fp32", "--experts", "hopper")
    assert code == 2
    assert "hopper experts cannot run the layer custom: does not compute in torch.float32" in err


def test_json_names_the_tables_of_this_run(cli, gpu, tmp_path: Path) -> None:
    (tmp_path / "of-something-else.json").write_text("{}")
    code, out, err = cli("tune", *SIZES, "--tokens", "4", "--output", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(out) == {"tables": [str(tmp_path / NAME)]}


def test_an_interrupted_run_goes_on(cli, gpu, tmp_path: Path) -> None:
    words = ("tune", *SIZES, "--tokens", "1", "64", "--output", tmp_path)
    gpu.stop_after = 5
    assert cli(*words)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == [NAME + ".partial"]
    gpu.stop_after = 10**9
    assert cli(*words)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    searched, compared = 2 * 2 * 2, 2 * 2 * 3
    assert gpu.calls == searched + compared + 1, "only the interrupted one is asked for twice"


def test_the_layer_of_a_checkpoint(cli, gpu, mixtral: Path, tmp_path: Path) -> None:
    code, _, err = cli("tune", mixtral, "--tokens", "4", "--dtype", "bf16", "--output", tmp_path)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["E8-K2-H64-I128-bf16-halves.json"]


def test_progress_without_tqdm_is_lines(cli, gpu, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    code, out, err = cli("tune", *SIZES, "--tokens", "4", "--output", tmp_path, "--json")
    assert code == 0
    assert json.loads(out) == {"tables": [str(tmp_path / NAME)]}
    lines = err.splitlines()
    assert lines[0].startswith("[0/6] custom: compiling")
    assert lines[-1] == "[6/6] custom: done"


def test_showing_a_table_of_another_engine(cli, tmp_path: Path) -> None:
    path = tmp_path / "E=8,N=14336,device_name=NVIDIA_H200.json"
    entry = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
    entry |= {"num_warps": 4, "num_stages": 3}
    path.write_text(json.dumps({"1": entry, "64": entry | {"BLOCK_SIZE_M": 64}}))
    code, out, err = cli("tune", "--show", path)
    assert code == 0, err
    assert "NVIDIA_H200" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "64"]
    assert rows[0][2] == "16x32x128"
    code, out, _ = cli("tune", "--show", path, "--tokens", "100", "--json")
    assert code == 0
    assert list(json.loads(out)["tiles"]) == ["100"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SIZES], "tuning measures a GPU"),
        ([*SIZES, "--tokens", "0"], "token counts must lie in [1,"),
        (["--shapes", "gpt-7"], "unknown shape 'gpt-7'"),
        (["--shapes", "olmoe", "--top-k", "2"], "give --shapes, or sizes"),
        ([], "not complete: give --num-experts"),
        (["--show", "/nowhere.json"], "No such file"),
        (["--show", "/nowhere/E=1.json"], "is not named"),
    ],
)
def test_bad_words_for_tune(cli, words: list[str], message: str) -> None:
    device = () if "--show" in words else ("--device", "cpu")
    code, out, err = cli("tune", *device, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_other_verbs_take_a_table_and_say_so(cli, tmp_path: Path) -> None:
    path = tmp_path / "E=8,N=96,device_name=NVIDIA_H200.json"
    entry = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1}
    path.write_text(json.dumps({"1": entry | {"num_warps": 4, "num_stages": 3}}))
    common = (*SIZES, "--device", "cpu")
    code, out, err = cli("explain", *common, "--tuned-table", path)
    assert (code, out) == (2, "")
    assert "cpu: does not support a tuned table" in err, "its experts have no tiles"
    for verb, words in (
        ("explain", ("--tuned-table", tmp_path / "none.json")),
        ("bench", ("--tokens", "2", "--no-peers", "--tuned-table", tmp_path / "none.json")),
    ):
        code, out, err = cli(verb, *common, *words)
        assert (code, out) == (2, "")
        assert "No such file" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "by the layer's shape; no table cpu/E8-K2-H64-I96-bf16-halves.json is packaged"),
        ({"batch_invariant": True}, "the same for every batch"),
        ({"tuned_table": "E=8,N=96,device_name=NVIDIA_H200.json"}, "the given table"),
    ],
)
def test_where_tiles_come_from_in_words(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedmoe.activation import MoEActivation
    from fusedmoe.config import FusedMoEConfig, MoEOptions
    from fusedmoe.tuning.choice import source_of_tiles

    monkeypatch.chdir(tmp_path)
    entry = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1}
    name = Path("E=8,N=96,device_name=NVIDIA_H200.json")
    name.write_text(json.dumps({"1": entry | {"num_warps": 4, "num_stages": 3}}))
    config = FusedMoEConfig(
        num_experts=8,
        num_local_experts=8,
        experts_per_token=2,
        hidden_dim=64,
        intermediate_size_per_partition=96,
        activation=MoEActivation.SILU,
        in_dtype=torch.bfloat16,
        device=torch.device("cpu"),
        options=MoEOptions(**options),
    )
    assert words in source_of_tiles(config)
