"""balance: the load of ranks before and after experts are placed anew, as a table and a picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

SIZES = ("--num-experts", "32", "--top-k", "4", "--tokens", "512")


def test_a_distribution_by_name(cli) -> None:
    words = (*SIZES, "--layers", "2", "--ranks", "4", "8", "--redundant-experts", "8", "--json")
    code, out, err = cli("balance", *words)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert (record["layers"], record["experts"], record["picks"]) == (2, 32, 2 * 512 * 4)
    assert [row["ranks"] for row in record["rows"]] == [4, 8]
    for row in record["rows"]:
        assert row["redundant"] == 8
        assert 1.0 <= row["balanced"] < 1.02 < row["in_order"]
    code, out, _ = cli("balance", *SIZES, "--routing", "balanced", "--ranks", "4")
    assert code == 0
    assert out.splitlines()[-1].split() == ["4", "0", "1", "1"]


def test_what_a_model_picks(cli, mixtral: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ("--device", "cpu", "--max-new-tokens", "4", "--ranks", "2", "--json")
    code, out, err = cli("balance", mixtral, *arguments, "--prompt", "one two")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert (record["layers"], record["experts"]) == (2, 8)
    tokens = record["picks"] // (2 * 2)
    assert record["picks"] == tokens * 2 * 2
    assert tokens >= 4
    assert 1.0 <= record["rows"][0]["balanced"] <= record["rows"][0]["in_order"]


def test_the_picture(cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "load.svg"
    code, _, err = cli("balance", *SIZES, "--plot", path)
    assert (code, err) == (0, "")
    text = path.read_text()
    assert text.count("<svg") == 1
    assert "busiest" in text or "axes_2" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--num-experts, --top-k"),
        (("--num-experts", "8"), "the sizes: --top-k"),
        ((*SIZES, "--ranks", "5"), "32 slots (32 experts and their copies) do not divide over 5"),
        ((*SIZES, "--ranks", "0"), "must be positive"),
        ((*SIZES, "--redundant-experts", "-4"), "-4 redundant experts"),
        ((*SIZES, "--top-k", "33"), "top 33 of 32"),
        ((*SIZES, "--ranks", "2", "--redundant-experts", "34"), "no room for 66 slots"),
        ((*SIZES, "--prompt", "hi"), "--prompt would have no effect without a checkpoint"),
        (
            (*SIZES, "--max-new-tokens", "2"),
            "--max-new-tokens would have no effect without a checkpoint",
        ),
        ((*SIZES, "--device", "cpu"), "--device would have no effect without a checkpoint"),
        (("nowhere", "--routing", "uniform"), "--routing would have no effect with a checkpoint"),
        (("nowhere", "--num-experts", "8"), "--num-experts would have no effect with a checkpoint"),
        (("nowhere", "--max-new-tokens", "0"), "at least 1, got 0"),
        (("nowhere", "--dtype", "int4"), "unsupported dtype 'int4'"),
    ],
)
def test_what_makes_no_sense(cli, words, message) -> None:
    pytest.importorskip("transformers")
    code, out, err = cli("balance", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_layers_that_route_by_no_router_of_ours_are_refused(
    cli, mixtral: Path, tmp_path: Path
) -> None:
    from hf import tiny_models

    tiny_models.build(tiny_models.by_name("zaya")).save_pretrained(tmp_path)
    for file in mixtral.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    code, out, err = cli("balance", tmp_path, "--device", "cpu", "--ranks", "2")
    assert (code, out) == (2, "")
    assert "not all of its MoE layers route by a router of their own" in err


def test_ranks_that_do_not_fit_are_refused_before_a_model_generates(cli, mixtral: Path) -> None:
    pytest.importorskip("transformers")
    code, out, err = cli("balance", mixtral, "--device", "cpu", "--ranks", "3")
    assert (code, out) == (2, "")
    assert "8 slots (8 experts and their copies) do not divide over 3" in err
