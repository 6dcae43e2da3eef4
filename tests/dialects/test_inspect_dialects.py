"""``fusedmoe inspect`` names format and dialect; ``generate`` runs quantized folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import read_tensors, write_folders, write_gpt_oss
from safetensors.torch import save_file
from writers import CASES

from fusedmoe.cli import main

DIALECTS = {
    "deepseek": ("fp8", "fp8_block_32x32"),
    "ct nvfp4": ("compressed-tensors", "nvfp4"),
    "gptq act-order": ("gptq v1", "int4_g32_act_order"),
    "gptq v2 zero points": ("gptq v2", "int4_g32_zp"),
    "awq": ("awq", "int4_g32_zp"),
    "modelopt fp8": ("modelopt FP8", "fp8_tensor"),
    "quark mxfp6": ("quark", "mxfp6_e3m2"),
}


def inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["moe_layers"]


@pytest.mark.parametrize("name", DIALECTS)
def test_format_and_dialect(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES[name]).packed
    capsys.readouterr()
    for row in inspect(folder, capsys):
        assert (row["dialect"], row["format"]) == DIALECTS[name]
        assert row["problem"] is None
    assert main(["inspect", str(folder)]) == 0
    assert DIALECTS[name][0] in capsys.readouterr().out


def test_settings_beside_config_json_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["awq"]).packed
    config = json.loads((folder / "config.json").read_text())
    (folder / "quant_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quant_method"] == "awq"


def test_gpt_oss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_gpt_oss(tmp_path).packed
    capsys.readouterr()
    rows = inspect(folder, capsys)
    assert [(row["dialect"], row["format"]) for row in rows] == [("gpt-oss mxfp4", "mxfp4")] * 2


def test_what_would_not_load_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["awq"]).packed
    tensors = read_tensors(folder)
    del tensors["model.layers.1.mlp.experts.3.down_proj.qzeros"]
    save_file(tensors, folder / "model.safetensors")
    capsys.readouterr()
    good, bad = inspect(folder, capsys)
    assert good["problem"] is None
    assert "lacks model.layers.1.mlp.experts.3.down_proj.qzeros" in str(bad["problem"])
    assert main(["inspect", str(folder)]) == 0
    assert "it would not load: " in capsys.readouterr().out


def test_generate_runs_a_quantized_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = write_folders(tmp_path, "tiny-mixtral", CASES["gptq"])
    texts = []
    for folder in folders:
        capsys.readouterr()
        words = ["generate", str(folder), "--max-new-tokens", "5", "--device", "cpu", "--json"]
        assert main(words) == 0
        texts.append(json.loads(capsys.readouterr().out)["runs"][-1]["tokens"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("route", ["experts", "accelerate"])
@pytest.mark.parametrize("name", ["deepseek", "modelopt nvfp4"])
def test_generate_refuses_packed_weights_of_which_the_config_says_nothing(
    name: str, route: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers in fp8 without their scales would give text, too."""
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES[name]).packed
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    words = ["generate", str(folder), "--device", "cpu", "--max-new-tokens", "1"]
    assert main([*words, "--route", route]) == 2
    assert "but config.json names no quantization for it" in capsys.readouterr().err


def test_a_comparison_with_nothing_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folders(tmp_path, "tiny-mixtral", CASES["gptq"]).packed
    words = ["generate", str(folder), "--max-new-tokens", "2", "--device", "cpu", "--compare"]
    capsys.readouterr()
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "eager was not run: these experts are packed" in told
    assert "against" not in told
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_agree"] is None


def test_generate_rounds_floats_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folders(tmp_path, "tiny-mixtral", CASES["gptq"]).floats
    words = ["generate", str(folder), "--max-new-tokens", "3", "--device", "cpu"]
    capsys.readouterr()
    assert main([*words, "--quantize", "int8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"][-1]["tokens"]) == 3
    assert main([*words, "--quantize", "int7"]) == 2
    assert "unknown weight format 'int7'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gptq", "deepseek", "ct nvfp4"])
def test_explain_says_what_runs_a_quantized_layer(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES[name]).packed
    capsys.readouterr()
    assert main(["explain", str(folder), "--device", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "quantized" in record["experts"]
    plain = next(c for c in record["candidates"] if c["name"] == "torch")
    assert "does not run weights" in plain["reason"]


def test_explain_rounds_nothing_that_is_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"]).packed
    capsys.readouterr()
    assert main(["explain", str(folder), "--device", "cpu", "--quantize", "int8"]) == 2
    assert "--quantize rounds floats, and these experts are" in capsys.readouterr().err


def test_explain_of_what_would_not_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"]).packed
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "spqr"
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["explain", str(folder), "--device", "cpu"]) == 2
    assert "unknown quant_method 'spqr'" in capsys.readouterr().err


def test_bench_says_that_it_measures_floats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folders(tmp_path, "tiny-qwen3-moe", CASES["gptq"]).packed
    words = ["bench", str(folder), "--tokens", "1", "--dtypes", "fp32", "--device", "cpu"]
    capsys.readouterr()
    assert main([*words, "--no-peers", "--repeats", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {row["format"] for row in record["rows"]} == {"fp32"}
    assert any("stores experts as int4_g32; floats" in note for note in record["notes"])
