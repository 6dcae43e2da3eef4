"""What a bf16 layer has to reach on one H200, as data, and which of a report's rows do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verdicts import COLUMNS, Row, Verdict, is_met, on_measured_peers, words_of

PEER_CELLS = Path(__file__).with_name("peers_h200_bf16.json")
OURS, PLAIN = "fusedmoe", "fusedmoe:triton"
SKEWED = "power_law_1.2"
SKEWED_TOKENS = (2048, 4096, 8192, 16384)
SKEW_LOSS = 0.08
DENSE_SHARE = 0.97


@dataclass(frozen=True)
class Target:
    """Balanced routing from router logits. ``kind``: ``us`` at most, ``fraction`` (of the limit) or
    ``tflops`` at least; ``or_dense``: or that share of the rate of a dense product."""

    shape: str
    tokens: tuple[int, ...]
    kind: str
    value: float
    or_dense: float | None = None


TARGETS = (
    Target("qwen3-30b", (1,), "us", 25),
    Target("qwen3-30b", (2,), "us", 44),
    Target("qwen3-30b", (4,), "us", 80),
    Target("qwen3-30b", (8,), "us", 152),
    Target("qwen3-30b", (16, 32, 64, 128), "fraction", 0.93),
    Target("qwen3-30b", (256,), "fraction", 0.90),
    Target("qwen3-30b", (512,), "fraction", 0.88),
    Target("qwen3-30b", (1024,), "fraction", 0.82),
    Target("qwen3-30b", (8192, 16384), "tflops", 600),
    Target("qwen3.6-35b", (1,), "us", 20),
    Target("qwen3.6-35b", (8,), "us", 105),
    Target("qwen3.6-35b", (64,), "fraction", 0.93),
    Target("qwen3.6-35b", (16384,), "tflops", 520),
    Target("mixtral", (1,), "us", 175),
    Target("mixtral", (4, 8, 16, 32, 64), "fraction", 0.97),
    Target("mixtral", (4096, 16384), "tflops", 715, or_dense=DENSE_SHARE),
    Target("qwen3-235b-rank", (8192,), "tflops", 620),
    Target("gpt-oss-120b", (1,), "fraction", 0.80),
    Target("gpt-oss-120b", (64,), "fraction", 0.97),
    Target("gpt-oss-120b", (8192,), "tflops", 600),
    Target("olmoe", (1,), "us", 33),
    Target("olmoe", (64,), "fraction", 0.93),
    Target("olmoe", (8192,), "tflops", 600),
    Target("llama4-scout", (1,), "us", 63),
    Target("llama4-scout", (64,), "fraction", 0.97),
    Target("llama4-scout", (8192,), "tflops", 700),
)


def verdicts(rows: list[Row], runs: list[dict[str, Any]]) -> list[Verdict]:
    """All that can be said about ``rows``; each names the run whose ceilings it belongs to."""
    problems: dict[tuple[str, str, int], dict[str, Row]] = {}
    experts: dict[tuple[str, int], Row] = {}
    cells = json.loads(PEER_CELLS.read_text())
    for row in rows:
        if row["scope"] != "experts":
            key = row["shape"], row["routing"], row["T"]
            problems.setdefault(key, {})[row["impl"]] = row
        elif row["impl"] == OURS and row["routing"] == "uniform":
            experts[row["shape"], row["T"]] = row
    return [
        *_on_targets(problems, runs),
        *_on_skew(problems),
        *_on_others(problems, "peers", "> 1x", lambda ratio: ratio > 1, _is_peer),
        # 2 % are noise.
        *_on_others(problems, "own paths", ">= 0.98x", lambda r: r >= 0.98, _is_own_path),
        *_on_accuracy(problems),
        *(
            verdict
            for (shape, _), row in experts.items()
            for verdict in on_measured_peers(row, cells["shapes"].get(shape, {}), cells["tokens"])
        ),
    ]


def _on_targets(
    problems: dict[tuple[str, str, int], dict[str, Row]], runs: list[dict[str, Any]]
) -> list[Verdict]:
    found = []
    for target in TARGETS:
        for T in target.tokens:
            impls = problems.get((target.shape, "balanced", T), {})
            if OURS not in impls:
                continue
            row = impls[OURS]
            have, met = row[COLUMNS[target.kind]], is_met(target.kind, target.value, row)
            asked, detail = words_of(target.kind, target.value), ""
            if target.or_dense is not None:
                dense = runs[row["run"]]["bf16_tflops"]
                asked += f" or {target.or_dense:.0%} of {dense:.0f}"
                met = met or have >= target.or_dense * dense
                if "torch_mm" in impls:
                    in_turn = impls["torch_mm"]["tflops"]
                    detail = f"{have / in_turn:.1%} of the {in_turn:.0f} that torch.mm has in turn"
            measured = f"{have:.1%}" if target.kind == "fraction" else f"{have:.1f}"
            found.append(
                Verdict("target", target.shape, "balanced", T, asked, measured, met, detail)
            )
    return found


def _on_skew(problems: dict[tuple[str, str, int], dict[str, Row]]) -> list[Verdict]:
    found = []
    for (shape, routing, T), impls in problems.items():
        balanced = problems.get((shape, "balanced", T), {})
        if routing != SKEWED or T not in SKEWED_TOKENS or OURS not in impls or OURS not in balanced:
            continue
        loss = 1 - impls[OURS]["tflops"] / balanced[OURS]["tflops"]
        asked = f"loses < {SKEW_LOSS:.0%}"
        found.append(Verdict("skew", shape, routing, T, asked, f"{loss:.1%}", loss < SKEW_LOSS))
    return found


def _on_others(
    problems: dict[tuple[str, str, int], dict[str, Row]],
    what: str,
    asked: str,
    met: Callable[[float], bool],
    counts: Callable[[Row], bool],
) -> list[Verdict]:
    """Ours against the fastest of the others that count."""
    found = []
    for place, impls in problems.items():
        others = {name: row["us"] for name, row in impls.items() if counts(row)}
        if OURS in impls and others:
            best = min(others, key=lambda name: others[name])
            ratio = others[best] / impls[OURS]["us"]
            found.append(Verdict(what, *place, asked, f"{ratio:.2f}x", met(ratio), best))
    return found


def _is_peer(row: Row) -> bool:
    """The dense product aside."""
    return not row["impl"].startswith(OURS) and row["scope"] != "dense"


def _is_own_path(row: Row) -> bool:
    """Not what selection chose."""
    return row["impl"].startswith(f"{OURS}:")


def _on_accuracy(problems: dict[tuple[str, str, int], dict[str, Row]]) -> list[Verdict]:
    """Ours, whichever kernel that is, against the plain Triton one: errors against fp64."""
    found = []
    for (shape, routing, T), impls in problems.items():
        if not {OURS, PLAIN} <= impls.keys():
            continue
        ours, plain = impls[OURS]["error"], impls[PLAIN]["error"]
        asked, measured = f"<= {plain:.3g}", f"{ours:.3g}"
        found.append(Verdict("accuracy", shape, routing, T, asked, measured, ours <= plain, PLAIN))
    return found
