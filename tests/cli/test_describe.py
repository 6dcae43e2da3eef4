"""inspect, explain and env: they describe, and read nothing but headers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fusedmoe import FusedMoE, OnlineQuantization, explain
from fusedmoe.cli import main
from fusedmoe.cli.layers import storage_format
from fusedmoe.cli.output import format_bytes, print_table, printable, steps
from fusedmoe.presets import write_preset


def test_inspect_counts_bytes_as_stored(cli, mixtral: Path) -> None:
    code, out, err = cli("inspect", mixtral, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["family"] == "mixtral"
    assert (record["num_experts"], record["top_k"], record["activation"]) == (8, 2, "silu")
    assert record["bytes"] < sum(p.stat().st_size for p in mixtral.glob("*.safetensors"))
    one_expert = 3 * 64 * 128 * 4
    router = 8 * 64 * 4
    assert record["moe_layers"] == [
        {
            "layer": f"model.layers.{number}",
            "experts": 8,
            "format": "f32",
            "dialect": None,
            "activation": None,
            "problem": None,
            "expert_bytes": 8 * one_expert,
            "shared_bytes": 0,
            "router_bytes": router,
            "bytes_per_token": 2 * one_expert + router,
        }
        for number in (0, 1)
    ]
    in_layers = 2 * (2 * one_expert + router)
    assert record["bytes_per_token"] == in_layers + record["other_bytes_per_token"]
    embedding = 448 * 64 * 4
    unread = 2 * 6 * one_expert + embedding * 447 // 448
    assert record["bytes_per_token"] == record["bytes"] - unread


def test_inspect_finds_dense_layers_shared_experts_and_fused_weights(cli, tmp_path: Path) -> None:
    folder = write_preset("tiny-deepseek-v3", tmp_path / "deepseek")
    record = json.loads(cli("inspect", folder, "--json")[1])
    assert [row["layer"] for row in record["moe_layers"]] == ["model.layers.1", "model.layers.2"]
    assert {row["shared_bytes"] for row in record["moe_layers"]} == {3 * 64 * 32 * 4}
    assert {row["router_bytes"] for row in record["moe_layers"]} == {(16 * 64 + 16) * 4}

    folder = write_preset("tiny-gpt-oss", tmp_path / "gpt-oss")
    record = json.loads(cli("inspect", folder, "--json")[1])
    biases = (2 * 64 + 64) * 4
    assert record["moe_layers"][0]["expert_bytes"] == 8 * (3 * 64 * 64 * 4 + biases)
    assert record["moe_layers"][0]["experts"] == 8


def test_inspect_prints_equal_layers_once(cli, mixtral: Path) -> None:
    code, out, _ = cli("inspect", mixtral)
    assert code == 0
    assert "model.layers.0 .. model.layers.1" in out
    assert "768.00 KiB" in out


def test_inspect_reads_a_family_that_the_table_lacks(cli, mixtral: Path, tmp_path: Path) -> None:
    for path in mixtral.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((mixtral / "config.json").read_text()) | {"model_type": "newcomer"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    record = json.loads(cli("inspect", tmp_path, "--json")[1])
    assert record["family"] is None
    assert [row["experts"] for row in record["moe_layers"]] == [8, 8]
    assert record["moe_layers"][0]["bytes_per_token"] == 2 * 3 * 64 * 128 * 4 + 8 * 64 * 4


@pytest.mark.parametrize(
    ("leaves", "method", "expected"),
    [
        ({"weight": {"BF16"}}, None, "bf16"),
        ({"": {"F32"}, "bias": {"F32"}}, None, "f32"),
        ({"weight": {"F8_E4M3"}, "weight_scale_inv": {"F32"}}, "fp8", "f8_e4m3, block scales"),
        ({"weight": {"F8_E4M3"}, "weight_scale": {"F32"}}, "compressed-tensors", "f8_e4m3, scales"),
        ({"blocks": {"U8"}, "scales": {"U8"}, "bias": {"BF16"}}, "mxfp4", "mxfp4"),
        ({"weight": {"U8"}, "weight_scale": {"F8_E4M3"}, "weight_scale_2": {"F32"}}, "x", "nvfp4"),
        ({"weight_packed": {"U8"}, "weight_global_scale": {"F32"}}, "x", "nvfp4"),
        ({"weight": {"I8"}, "scale": {"F32"}}, "deepseek", "i8, scales"),
        ({"qweight": {"I32"}, "scales": {"F16"}, "qzeros": {"I32"}}, "gptq", "gptq int32"),
        ({"weight_packed": {"I32"}, "weight_scale": {"BF16"}}, "x", "pack-quantized int32"),
    ],
)
def test_storage_formats(leaves: dict[str, set[str]], method: str | None, expected: str) -> None:
    assert storage_format(leaves, method) == expected


def test_explain_a_layer_and_a_checkpoint(cli, mixtral: Path) -> None:
    sizes = ("--num-experts", "8", "--top-k", "2", "--hidden-size", "64")
    code, out, err = cli(
        "explain", *sizes, "--intermediate-size", "128", "--dtype", "fp32", "--device", "cpu"
    )
    assert code == 0, err
    code, from_files, err = cli("explain", mixtral, "--device", "cpu")
    assert code == 0, err
    assert out == from_files
    assert out.splitlines()[1].startswith("experts: ")


def test_explain_forces_an_implementation_and_lists_every_candidate(cli, mixtral: Path) -> None:
    record = json.loads(cli("explain", mixtral, "--experts", "torch", "--json")[1])
    assert record["experts"] == "torch"
    record = json.loads(cli("explain", mixtral, "--device", "cpu", "--json")[1])
    assert record["layer"]["activation"] == "silu"
    assert {candidate["name"] for candidate in record["candidates"]} >= {"torch"}
    chosen = [c for c in record["candidates"] if c["name"] == record["experts"]]
    assert chosen[0]["reason"] is None


def test_explain_of_experts_that_would_be_rounded(cli, mixtral: Path) -> None:
    for name in ("int4_g32", "int8", "mxfp4"):
        asked = cli("explain", mixtral, "--quantize", name, "--device", "cpu", "--json")
        format = OnlineQuantization.of(name)
        layer = FusedMoE(8, 2, 64, 128, params_dtype=torch.float32, quant_config=format)
        assert json.loads(asked[1])["experts"] == explain(layer).chosen.name
    for name, message in {
        "int4_g128": "128 columns do not divide 64 columns; those of int4_g64 do\n",
        "int3": "unknown weight format 'int3'",
    }.items():
        code, out, err = cli("explain", mixtral, "--quantize", name)
        assert (code, out) == (2, "")
        assert message in err


def test_explain_reads_activation_and_bias_off_the_files(cli, tmp_path: Path) -> None:
    folder = write_preset("tiny-gpt-oss", tmp_path / "gpt-oss")
    record = json.loads(cli("explain", folder, "--json")[1])
    assert record["layer"]["activation"] == "swigluoai"
    assert record["layer"]["bias"] == "True"


def test_env(cli) -> None:
    code, out, _ = cli("env")
    assert code == 0
    assert "torch" in out
    record = json.loads(cli("env", "--json")[1])
    assert record["packages"]["torch"]
    assert record["devices"][0]["device"] == "cpu"
    able = {name for name, why in record["devices"][0]["experts"].items() if why is None}
    assert {"cpu", "grouped_mm", "torch", "torch_quantized"} <= able
    assert "triton_quantized" not in able


def test_a_reader_that_leaves_is_no_bad_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``fusedmoe env | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["env"]) == 141
    assert capsys.readouterr().err == ""


def test_help_names_every_verb(cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for verb in ("generate", "inspect", "explain", "env", "bench"):
        assert verb in out


def test_tables_align_numbers_right_and_print_none_as_a_dash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(["name", "count", "ok"], [["a", 5, True], ["long name", 12345.6, False]])
    print_table(["empty"], [])
    print_table(["x"], [[None], [0.123456]])
    assert capsys.readouterr().out.splitlines() == [
        "name       count  ok",
        "---------  -----  ---",
        "a              5  yes",
        "long name  12346  no",
        "empty",
        "-----",
        "    x",
        "-----",
        "    -",
        "0.123",
    ]


def test_what_a_hostile_checkpoint_says_is_never_obeyed(cli, tmp_path: Path) -> None:
    """Names of tensors, of the model and of formats, in tables, in JSON and in errors."""
    from safetensors.torch import save_file

    shapes = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    tensors = {
        f"\x1b[31m\x9bmodel\x07.layers.0.mlp.experts.{e}.{name}.weight": torch.zeros(shape)
        for e in range(2)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "evil\x1b[2J", "hidden_act": "silu\x1b[32m\x9b"}
    config["quantization_config"] = {"quant_method": "x\x1b]0;hi\x07"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen = [cli("inspect", tmp_path), cli("inspect", tmp_path, "--json")]
    seen += [cli("explain", tmp_path), cli("inspect", tmp_path / "no\x1bwhere")]
    assert [code for code, _, _ in seen] == [0, 0, 2, 2]
    for _, out, err in seen:
        assert not [c for c in out + err if not c.isprintable() and c != "\n"]
    assert json.loads(seen[1][1])["model_type"] == "evil\x1b[2J"


def test_bytes_and_text() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "3.00 GiB",
        "5.00 TiB",
    ]
    assert printable("a\tb\x1b[0m\u202e é\n") == "a\\tb\\x1b[0m\\u202e é\n"


def test_steps_are_silent_while_they_are_quick_and_lines_without_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for delay, shown in ((60.0, ""), (0.0, "reading: two")):
        with steps("reading", delay) as show:
            show(0, 2, "one")
            show(1, 2, "two")
        assert shown in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with steps("reading", lines=True) as show:
        show(0, 2, "one")
        show(1, 2, "two")
    assert capsys.readouterr().err == "[0/2] reading: one\n[1/2] reading: two\n"


def test_a_given_activation_stands_for_one_that_is_not_known(
    cli, mixtral: Path, tmp_path: Path
) -> None:
    mixtral = shutil.copytree(mixtral, tmp_path / "mixtral")
    path = mixtral / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "softplus"}))
    code, _, err = cli("explain", mixtral)
    assert code == 2
    assert "'softplus'" in err
    assert err.endswith("--activation takes one of these instead\n")
    code, out, err = cli("explain", mixtral, "--activation", "gelu", "--json")
    assert code == 0, err
    assert json.loads(out)["layer"]["activation"] == "gelu"
    words = "--activation", "gelu", "--tokens", "1", "--dtypes", "fp32", "--repeats", "1"
    code, _, err = cli("bench", mixtral, *words, "--no-peers", "--device", "cpu")
    assert code == 0, err
