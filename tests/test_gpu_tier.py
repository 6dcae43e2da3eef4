"""Processes of the GPU tier run every test once, neighbours together."""

import importlib.util
from itertools import chain, pairwise
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "tools" / "gpu_tier.py"


@pytest.fixture
def tier():
    spec = importlib.util.spec_from_file_location("gpu_tier", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("tests", "count"), [(0, 3), (5, 2), (1000, 12), (33, 1)])
def test_shares_have_every_test_once_and_neighbours_together(tier, tests, count):
    shares = [tier.share_of(range(tests), i, count) for i in range(count)]
    assert sorted(chain(*shares)) == list(range(tests))
    for share in shares:
        runs = sum(b != a + 1 for a, b in pairwise(share)) + bool(share)
        assert runs <= -(-len(share) // tier.NEIGHBOURS)


def test_outcomes_are_counted_and_failures_named_as_they_come(tier, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(tier.REPORT, str(tmp_path / "report"))

    class Report:
        when, outcome, failed, nodeid, longrepr = "call", "passed", False, "one", ""

    tier.pytest_runtest_logreport(Report)
    Report.outcome, Report.failed, Report.nodeid, Report.longrepr = "failed", True, "two", "why"
    tier.pytest_runtest_logreport(Report)
    assert (tmp_path / "report").read_text().split() == ["passed", "failed"]
    assert capsys.readouterr().err == "FAILED two\nwhy\n"
