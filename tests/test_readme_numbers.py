"""The speeds on README and in docs/ are those of the files they are said to come from."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tables():
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        return importlib.import_module("readme_tables")


PAGES = {"README.md": 5, "docs/scaling.md": 4, "docs/formats.md": 1, "docs/megatron.md": 1}


@pytest.mark.parametrize("page", PAGES)
def test_every_measured_section_says_what_its_file_says(tables, page):
    text = (ROOT / page).read_text()
    assert len(tables.MARKED.findall(text)) >= PAGES[page]
    assert tables.renewed(text) == text


@pytest.mark.parametrize("page", PAGES)
def test_another_number_is_noticed(tables, page):
    """One digit of a measured section, in each of them."""
    text = (ROOT / page).read_text()
    for found in tables.MARKED.finditer(text):
        at = re.compile(r"\d").search(text, found.end(1), found.start(3)).start()
        other = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        assert other != text
        assert tables.renewed(other) == text


def layer_rows() -> list[dict[str, Any]]:
    """As ep_layer.py writes them, with a way that one size was not measured by."""
    common = {"scope": "layer", "shape": "qwen3-235b", "format": "bf16"}
    rows = []
    for ranks, T, way, us, scaling in (
        (1, 8, "no_ep", 100.0, 1.0),
        (2, 8, "peer", 80.0, 1.25),
        (4, 8, "peer", 50.0, 2.0),
        (4, 2048, "peer", 1200.0, None),
        (4, 2048, "peer+sent", 12345.0, None),
    ):
        row = {"impl": f"fusedmoe:{way}", "ranks": ranks, "T": T, "us": us, "experts_us": 40.0}
        row |= {"wire_limit_us": 300.0 if T > 1000 else 3.04, "overlap_limit_us": 66.0}
        row |= {"target_met": False if T > 1000 else None}
        rows.append(common | row | ({} if scaling is None else {"scaling": scaling}))
    return [*rows, common | {"scope": "experts", "impl": "local_experts", "ranks": 4, "T": 8}]


def test_layers_are_listed_by_size_and_way(tables, monkeypatch, tmp_path):
    sections = tables.scaling_tables
    monkeypatch.setattr(sections, "RESULTS", tmp_path)
    assert sections.layers_section() == "No `ep_layer.json` is recorded yet.\n"
    assert sections.balance_section() == "No `balance.json` is recorded yet.\n"
    (tmp_path / "h200-x4").mkdir()
    (tmp_path / "h200-x4" / "ep_layer.json").write_text(json.dumps({"rows": layer_rows()}))
    text = sections.layers_section()
    assert text.startswith("Qwen3-235B, bf16, 4 GPUs ([")
    ways = "| `peer` | `peer+sent` | exposed by `peer` |"
    assert f"{ways} asked | scaling to 2 | scaling to 4 |" in text
    assert "| 8 | 40.0 us | 3.0 us | 50.0 us | - | 10.0 us, 20 % | - | 1.25 | 2.00 |" in text
    line = "| 2048 | 40.0 us | 300 us | 1200 us | 12.35 ms | 1160 us, 97 % | 66.0 us | - | - |"
    assert line in text


def test_what_the_wire_has_to_reach(tables):
    reached = tables.scaling_tables.reached
    assert reached(4, 1, 14.0, 0.2, 35.0)
    assert not reached(4, 1, 14.1, 0.2, 40.0)
    assert not reached(4, 16, 12.0, 2.6, 29.9)  # NCCL is not 2.5 times as slow
    assert reached(4, 1024, 200.0, 150.0, 221.0)
    assert not reached(4, 1024, 201.0, 150.0, 300.0)
    assert not reached(4, 4096, 700.0, 660.0, 769.0)
    assert reached(2, 1, 99.0, 0.2, 35.0) is None
