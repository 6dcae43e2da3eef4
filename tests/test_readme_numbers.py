"""README's speeds are those of the files they are said to come from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tables():
    path = ROOT / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_measured_section_says_what_its_file_says(tables):
    text = (ROOT / "README.md").read_text()
    assert len(tables.MARKED.findall(text)) >= 4
    assert tables.renewed(text) == text


def test_another_number_is_noticed(tables):
    text = (ROOT / "README.md").read_text()
    assert tables.renewed(text.replace("| 23 us,", "| 13 us,")) == text
