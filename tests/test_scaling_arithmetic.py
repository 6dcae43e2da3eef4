"""The table of docs/scaling.md for more GPUs than were at hand follows from the sizes it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

H, I, E, K = 7168, 2048, 256, 8  # noqa: E741
BESIDE = 64  # bytes of ids and weights in each copy
TEXT = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
ROWS = [
    line.strip("| ").split(" | ")
    for line in TEXT[TEXT.index("## The arithmetic of more") :].splitlines()
    if re.match(r"\| \d+ \|", line)
]


def remote_copies(ranks: int) -> float:
    """Of a token with K picks, uniformly: the ranks that hold one of them, but for its own."""
    return (ranks - 1) * (1 - (1 - 1 / ranks) ** K)


def test_there_are_rows_up_to_320():
    assert [int(row[0]) for row in ROWS] == [4, 8, 16, 32, 64, 128, 320]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row(row):
    ranks, slots = int(row[0]), int(row[1])
    weights, copies, out_and_back, rows = row[2:]
    assert slots * ranks >= E
    assert float(weights.split()[0]) == pytest.approx(slots * 3 * H * I / 1e9, rel=0.03, abs=5e-3)
    assert float(copies) == round(remote_copies(ranks), 1)
    out, back = map(int, out_and_back.removesuffix(" KB").split(" / "))
    assert out == round(remote_copies(ranks) * (H + H // 128 * 4 + BESIDE) / 1e3)
    assert back == round(remote_copies(ranks) * 2 * H / 1e3)
    assert int(rows) == round(128 * ranks * K / (slots * ranks))


def test_times_that_follow():
    """4096 tokens over NVLink; a token over RDMA, where copies saturate, and in a host of eight."""

    def bytes_of(ranks: int) -> float:
        return remote_copies(ranks) * (H + H // 128 * 4 + BESIDE + 2 * H)

    assert "661 us for 4096\ntokens at 365 GB/s" in TEXT
    assert 4096 * bytes_of(4) / 365e9 == pytest.approx(661e-6, rel=0.01)
    assert "172 KB" in TEXT
    assert bytes_of(320) == pytest.approx(172e3, rel=0.01)
    assert "costs 3.4 us instead of the\n0.3 us" in TEXT
    assert bytes_of(320) / 50e9 == pytest.approx(3.4e-6, rel=0.02)
    assert round(bytes_of(8) / 365e9 * 1e6, 1) == 0.3
