"""benchmarks/ep_layer.py and ep_balance.py run from end to end over gloo, as they promise."""

from __future__ import annotations

import json

import pytest
import rank_ep_layer


@pytest.mark.parametrize("fmt", ["bf16", "fp8_block"])
def test_rows_of_layers_and_of_their_experts_alone(ranks, tmp_path, fmt):
    out = tmp_path / "ep_layer.json"
    words = f"--tiny --device cpu --tokens 1 40 --repeats 1 --format {fmt} --out {out}"
    ranks.run(rank_ep_layer.run_script, "ep_layer", [*words.split(), "--ranks", "1", "4"])
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    rows = report["rows"]
    layers = [row for row in rows if row["scope"] == "layer"]
    alone = [row for row in rows if row["scope"] == "experts"]
    assert report["p2p_gbs"] > 0
    assert [(row["ranks"], row["T"], row["E"]) for row in alone] == [
        *((1, 1, 8), (1, 40, 8), (4, 1, 2), (4, 40, 2))
    ]
    assert {row["impl"] for row in layers if row["ranks"] == 4} == {
        f"fusedmoe:{way}{how}" for way in ("naive_dp_ep", "all_to_all") for how in ("", "+halves")
    }
    assert all(row["us"] > 0 and row["format"] == fmt for row in rows)
    for row in layers:
        assert row["error"] < 0.03
        assert row["limit_us"] > 0
        assert row["exposed_us"] == pytest.approx(row["us"] - row["experts_us"], abs=0.02)
        asked = row["T"] >= 40 and row["ranks"] > 1
        assert (row["target_met"] is not None) == asked
        assert (row["wire_limit_us"] > 0) == (row["ranks"] > 1)
        assert row["ranks"] > 1 or row["scaling"] == 1


def test_files_are_joined(monkeypatch):
    """Rows that are there stay; others come with the run they are of, and scaling is anew."""
    monkeypatch.syspath_prepend(rank_ep_layer.BENCHMARKS)
    import ep_layer

    def row(ranks: int, us: float) -> dict[str, object]:
        key = {"shape": "tiny", "format": "bf16", "ranks": ranks, "T": 8, "impl": "x"}
        return key | {"scope": "layer", "us": us}

    run = {"device": "cpu", "commit": "abc", "command": "words", "date": "today"}
    record = {"rows": [row(4, 10.0)]}
    ep_layer.join(record, run | {"rows": [row(4, 99.0), row(1, 20.0)]})
    assert [one["us"] for one in record["rows"]] == [10.0, 20.0]
    assert [one.get("joined") for one in record["rows"]] == [None, 1]
    assert [one["scaling"] for one in record["rows"]] == [2.0, 1.0]
    assert record["joined"] == [run]


def test_experts_move_under_skewed_load(ranks, tmp_path):
    out = tmp_path / "balance.json"
    words = "--tiny --device cpu --tokens 64 --redundant 8 --layers 2 --repeats 1"
    ranks.run(rank_ep_layer.run_script, "ep_balance", [*words.split(), "--out", str(out)])
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    before, moving, after = report["rows"]
    assert [row["phase"] for row in report["rows"]] == ["before", "moving", "after"]
    assert before["imbalance"] > 1.3
    assert after["planned_for"] < 1 + (before["imbalance"] - 1) / 3
    assert moving["slots_changed"] > 0
    assert max(moving["error"], after["error"]) < 1e-2
