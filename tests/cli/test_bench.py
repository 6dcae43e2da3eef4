"""bench measures, writes what it measured, and draws it."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from fusedmoe.bench import LayerShape
from fusedmoe.cli.layer_config import shapes_asked
from fusedmoe.cli.plot import intensity, write_plot
from fusedmoe.presets import write_preset

DEVICES = ("cpu", "cuda")
SIZES = ("--num-experts", "4", "--top-k", "2", "--hidden-size", "32", "--intermediate-size", "16")
NOTHING_GIVEN = dict.fromkeys(
    ("shapes", "num_experts", "top_k", "hidden_size", "intermediate_size", "activation", "device")
) | {"bias": False}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes seconds, and here nobody wants to know."""
    monkeypatch.setattr("fusedmoe.bench.ceilings._ELEMENTS", dict.fromkeys(DEVICES, 1 << 12))
    monkeypatch.setattr("fusedmoe.bench.ceilings._MATMUL", dict.fromkeys(DEVICES, 64))
    monkeypatch.setattr("fusedmoe.bench.ceilings.LEAST_CEILINGS", {})


def test_a_report_as_table_file_and_picture(cli, tmp_path: Path) -> None:
    out_file, plot_file = tmp_path / "results" / "layer.json", tmp_path / "plots" / "layer.png"
    code, out, err = cli(
        *("bench", *SIZES, "--tokens", "1", "5", "--dtypes", "fp32", "bf16", "--repeats", "3"),
        *("--routings", "uniform", "one_expert", "--experts", "torch", "--device", "cpu"),
        *("--output", out_file, "--plot", plot_file),
    )
    assert code == 0, err
    report = json.loads(out_file.read_text())
    names = {row["impl"] for row in report["rows"]}
    assert names == {
        "fusedmoe",
        "fusedmoe:torch",
        "transformers_eager",
        "transformers_batched_mm",
        "transformers_grouped_mm",
    }
    assert len(report["rows"]) == len(names) * 2 * 2 * 2
    for row in report["rows"]:
        assert row["error"] < 0.02
        assert 2 <= row["active_experts"] <= 4
        assert row["us"] > 0
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    body = [line for line in out.splitlines() if line.startswith("custom")]
    assert len(body) == len(report["rows"])
    assert all(report[key] > 0 for key in ("read_gbs", "fp32_tflops", "bf16_tflops"))


def test_bounded_scratch_memory_shows_in_the_report(cli) -> None:
    def scratch(*words: str) -> tuple[int, float]:
        code, out, err = cli(
            *("bench", *SIZES, "--tokens", "9", "--dtypes", "fp32", "--repeats", "1", "--json"),
            *("--experts", "grouped_mm", "--no-peers", "--device", "cpu", *words),
        )
        assert code == 0, err
        row = next(r for r in json.loads(out)["rows"] if r["impl"] == "fusedmoe:grouped_mm")
        return row["workspace_bytes"], row["error"]

    (whole, _), (bounded, error) = scratch(), scratch("--max-workspace-bytes", "1024")
    assert bounded <= 1024 < whole
    assert error < 1e-5


def test_json_without_peers_on_a_checkpoints_own_layer(cli, mixtral: Path) -> None:
    code, out, err = cli(
        *("bench", mixtral, "--tokens", "3", "--dtypes", "fp32", "--repeats", "2"),
        *("--no-peers", "--device", "cpu", "--json"),
    )
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert (row["shape"], row["E"], row["k"], row["H"], row["I"]) == ("mixtral", 8, 2, 64, 128)
    assert row["impl"] == "fusedmoe"


@pytest.mark.gpu
def test_on_a_gpu(cli, tmp_path: Path) -> None:
    code, out, err = cli(
        *("bench", "--num-experts", "8", "--top-k", "2", "--hidden-size", "256"),
        *("--intermediate-size", "128", "--tokens", "1", "7", "--dtypes", "bf16", "fp32"),
        *("--repeats", "3", "--device", "cuda", "--experts", "triton", "torch", "--json"),
        *("--plot", tmp_path / "layer.png"),
    )
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {"fusedmoe", "fusedmoe:triton"} <= {row["impl"] for row in rows}, json.loads(out)[
        "notes"
    ]
    assert all(row["error"] < 0.02 for row in rows)


OWN = """
from fusedmoe.experts.torch_reference import TorchExperts

class Mine(TorchExperts):
    name = "mine"

class NotOne:
    pass
"""


def test_an_implementation_of_ones_own(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``module:Class`` from the current folder is measured beside the library's."""
    (tmp_path / "own_experts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    common = (*SIZES, "--device", "cpu", "--json")
    code, out, err = cli(
        *("bench", *common, "--tokens", "2", "--dtypes", "fp32", "--repeats", "2", "--no-peers"),
        *("--experts", "own_experts:Mine"),
    )
    assert code == 0, err
    assert [row["impl"] for row in json.loads(out)["rows"]] == ["fusedmoe", "fusedmoe:mine"]
    code, out, err = cli("explain", *common, "--experts", "own_experts:Mine")
    assert json.loads(out)["experts"] == "mine"
    for wrong in ("own_experts:NotOne", "own_experts:Missing", "no_such_module:Mine"):
        code, _, err = cli("explain", *common, "--experts", wrong)
        assert code == 2
        assert err.count("\n") == 1


def test_activation_and_biases_are_the_checkpoints(cli, tmp_path: Path) -> None:
    folder = write_preset("tiny-gpt-oss", tmp_path / "oss")
    code, out, err = cli(
        *("bench", folder, "--tokens", "3", "--dtypes", "fp32", "--repeats", "1"),
        *("--device", "cpu", "--json"),
    )
    assert code == 0, err
    report = json.loads(out)
    # Transformers' peer is the module of a family with biases and swigluoai, or is left out.
    assert {row["impl"] for row in report["rows"]} >= {"fusedmoe", "transformers_grouped_mm"}
    assert all(row["error"] < 1e-5 for row in report["rows"])
    assert shapes_asked(Namespace(checkpoint=str(folder), **NOTHING_GIVEN))[0] == [
        LayerShape("oss", 8, 2, 64, 64, activation="swigluoai", bias=True)
    ]


def test_a_plot_without_matplotlib_is_refused_before_measuring(
    cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("fusedmoe.bench.run_layer_bench", None)
    code, out, err = cli("bench", *SIZES, "--device", "cpu", "--plot", "x.png")
    assert (code, out) == (2, "")
    assert "pip install 'fusedmoe[bench]'" in err


def test_experts_in_fewer_bits_beside_floats(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer bytes and with the error of rounding; what forced experts do not run is a note."""
    machine = {"read_gbs": 10.0, "copy_gbs": 10.0, "fp32_tflops": 1.0}
    monkeypatch.setattr("fusedmoe.bench.ceilings.measure_ceilings", lambda *_: machine)
    code, out, err = cli(
        *("bench", *SIZES, "--tokens", "3", "--dtypes", "fp32", "--repeats", "1"),
        *("--device", "cpu", "--formats", "int8_channel", "int4_g16", "--experts", "torch"),
        *("--no-peers", "--json"),
    )
    assert code == 0, err
    report = json.loads(out)
    rows = {row["impl"]: row for row in report["rows"]}
    assert {name: row["format"] for name, row in rows.items()} == {
        "fusedmoe": "fp32",
        "fusedmoe:torch": "fp32",
        "fusedmoe@int8_channel": "int8_channel",
        "fusedmoe@int4_g16": "int4_g16",
    }
    floats, eight, four = (rows[f"fusedmoe{at}"] for at in ("", "@int8_channel", "@int4_g16"))
    assert floats["error"] < 1e-5 < eight["error"] < 0.03 < four["error"] < 0.3
    assert 3 < floats["limit_us"] / eight["limit_us"] < 4
    assert sum("fusedmoe:torch@" in note for note in report["notes"]) == 2


def test_experts_without_a_gate(cli) -> None:
    code, out, err = cli(
        *("bench", *SIZES, "--tokens", "3", "--dtypes", "fp32", "--repeats", "1"),
        *("--device", "cpu", "--activation", "relu2_no_mul", "--no-peers", "--json"),
    )
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert row["error"] < 1e-5
    shape = LayerShape("custom", row["E"], row["k"], row["H"], row["I"], activation="relu2_no_mul")
    assert shape.weight_elements == row["E"] * 2 * row["H"] * row["I"]


def test_what_could_not_be_measured_is_a_note(cli) -> None:
    code, out, _ = cli(
        *("bench", *SIZES, "--tokens", "1", "--dtypes", "fp32", "--repeats", "2"),
        *("--no-peers", "--device", "cpu", "--experts", "triton"),
    )
    assert code == 0
    assert "note: custom: fusedmoe:triton left out" in out


def test_nothing_measured_says_why(cli, tmp_path: Path) -> None:
    """Of a table that no kernel of this machine reads, with nobody else to measure."""
    entry = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
    table = tmp_path / "E=4,N=16,device_name=NVIDIA_H200.json"
    table.write_text(json.dumps({"1": entry | {"num_warps": 4, "num_stages": 2}}))
    code, out, err = cli(
        *("bench", *SIZES, "--tokens", "1", "--device", "cpu", "--no-peers"),
        *("--repeats", "5", "--tuned-table", table),
    )
    assert (code, out) == (2, "")
    assert "nothing was measured: custom: fusedmoe left out" in err


def test_peers_by_name_and_rows_as_csv(cli, tmp_path: Path) -> None:
    csv_file = tmp_path / "new" / "layer.csv"
    code, out, err = cli(
        *("bench", *SIZES, "--tokens", "3", "--dtypes", "bf16", "--repeats", "1"),
        *("--device", "cpu", "--peers", "torch_grouped_mm_alone", "torch_reference"),
        *("--csv", csv_file),
    )
    assert code == 0, err
    names, *rows = csv_file.read_text().splitlines()
    assert names.startswith("impl,shape,E,")
    assert [row.split(",")[0] for row in rows] == [
        "fusedmoe",
        "torch_grouped_mm_alone",
        "torch_reference",
    ]
    assert "torch_reference" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "gpt-7"], "unknown shape 'gpt-7'; known: qwen3-30b"),
        (["--shapes", "olmoe", "--top-k", "2"], "give --shapes, or sizes, or a checkpoint"),
        (["--top-k", "2"], "not complete: give --num-experts"),
        ([*SIZES, "--top-k", "9"], "experts_per_token 9 does not lie in [1, num_experts 4]"),
        ([*SIZES, "--formats", "int3"], "unknown weight format 'int3'; known:"),
        ([*SIZES, "--tokens", "0"], "at least 1, got 0"),
        ([*SIZES, "--repeats", "0"], "--repeats must be at least 1, got 0"),
        ([*SIZES, "--dtypes", "int4"], "unsupported dtype 'int4'"),
        ([*SIZES, "--routings", "chaos"], "chaos"),
        ([*SIZES, "--scope", "model"], "unknown scope 'model'"),
        ([*SIZES, "--experts", "warp-drive"], "'warp-drive'; known:"),
        ([*SIZES, "--peers", "warp-drive"], "unknown peer 'warp-drive'; known: transformers"),
        ([*SIZES, "--no-peers", "--peers", "torch_mm"], "--peers would have no effect"),
        ([*SIZES, "--csv", "/dev/null/x.csv"], "/dev/null is no folder to write into"),
        ([*SIZES, "--output", "/dev/null/x.json"], "/dev/null is no folder to write into"),
        ([*SIZES, "--output", "/dev"], "/dev is a folder"),
        ([*SIZES, "--plot", "/dev/null/x.png"], "/dev/null is no folder to write into"),
        ([*SIZES, "--hidden-size", "1000000000000"], "of weights"),
        (["/nowhere/at/all"], "no such folder"),
    ],
)
def test_bad_words(cli, words: list[str], message: str) -> None:
    code, out, err = cli("bench", "--device", "cpu", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("fusedmoe bench: error: ")  # no bar: nothing was measured yet
    assert err.count("\n") == 1


def test_a_kind_of_picture_that_is_not_written_is_refused_before_measuring(cli) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = cli("bench", *SIZES, "--device", "cpu", "--plot", "x.docx")
    assert code == 2
    assert "a plot is one of" in err


def test_intensity_counts_the_experts_that_were_picked() -> None:
    row = {"T": 8, "k": 2, "E": 4, "H": 32, "I": 16, "format": "fp32", "active_experts": 3.0}
    row |= {"us": 2.0, "tflops": 6 * 8 * 2 * 32 * 16 / 2e6}
    moved = 4 * (3 * 3 * 32 * 16 + 2 * 8 * 32)
    assert intensity(row) == pytest.approx(6 * 8 * 2 * 32 * 16 / moved)
    assert intensity(row | {"active_experts": None}) < intensity(row)
    assert intensity(row | {"format": "bf16"}) == pytest.approx(2 * intensity(row))
    four = 6 * 8 * 2 * 32 * 16 / (3 * 3 * 32 * 16 / 2 + 2 * 2 * 8 * 32)
    assert intensity(row | {"format": "int4_g32"}) == pytest.approx(four)
    no_gate = row | {"tflops": 4 * 8 * 2 * 32 * 16 / 2e6}
    moved = 4 * (3 * 2 * 32 * 16 + 2 * 8 * 32)
    assert intensity(no_gate) == pytest.approx(4 * 8 * 2 * 32 * 16 / moved)


def test_an_empty_report_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows to draw"):
        write_plot({"rows": []}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
