"""What a bf16 layer has to reach on one H200, as data, and which of a report's rows do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verdicts import Verdict, words_of

Row = dict[str, Any]

PEER_CELLS = Path(__file__).with_name("peers_h200_bf16.json")
OURS, PLAIN = "fusedmoe", "fusedmoe:triton"
SKEWED = "power_law_1.2"
SKEWED_TOKENS = (2048, 4096, 8192, 16384)
SKEW_LOSS = 0.08
PEER_SHARE = PEER_LIMIT = DENSE_SHARE = 0.97


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
    for row in rows:
        if row["scope"] != "experts":
            key = row["shape"], row["routing"], row["T"]
            problems.setdefault(key, {})[row["impl"]] = row
        elif row["impl"] == OURS and row["routing"] == "uniform":
            experts[row["shape"], row["T"]] = row
    return [
        *_on_targets(problems, runs),
        *_on_skew(problems),
        *_on_peers(problems),
        *_on_own_paths(problems),
        *_on_accuracy(problems),
        *_on_measured_peers(experts),
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
            have = row[
                {"us": "us", "fraction": "fraction_of_limit", "tflops": "tflops"}[target.kind]
            ]
            met = have <= target.value if target.kind == "us" else have >= target.value
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


def _on_peers(problems: dict[tuple[str, str, int], dict[str, Row]]) -> list[Verdict]:
    """Ours against the fastest of everything else in the run, the dense product aside."""
    found = []
    for (shape, routing, T), impls in problems.items():
        others = {
            name: row["us"]
            for name, row in impls.items()
            if not name.startswith(OURS) and row["scope"] != "dense"
        }
        if OURS in impls and others:
            best = min(others, key=lambda name: others[name])
            ratio = others[best] / impls[OURS]["us"]
            found.append(
                Verdict("peers", shape, routing, T, "> 1x", f"{ratio:.2f}x", ratio > 1, best)
            )
    return found


def _on_own_paths(problems: dict[tuple[str, str, int], dict[str, Row]]) -> list[Verdict]:
    """What selection chose, against our other implementations (2 % are noise)."""
    found = []
    for (shape, routing, T), impls in problems.items():
        others = {name: row["us"] for name, row in impls.items() if name.startswith(f"{OURS}:")}
        if OURS in impls and others:
            best = min(others, key=lambda name: others[name])
            ratio = others[best] / impls[OURS]["us"]
            found.append(
                Verdict(
                    "own paths", shape, routing, T, ">= 0.98x", f"{ratio:.2f}x", ratio >= 0.98, best
                )
            )
    return found


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


def _on_measured_peers(experts: dict[tuple[str, int], Row]) -> list[Verdict]:
    cells = json.loads(PEER_CELLS.read_text())
    found = []
    for (shape, T), row in experts.items():
        if shape not in cells["shapes"] or T not in cells["tokens"]:
            continue
        times = {
            name: values[cells["tokens"].index(T)]
            for name, values in cells["shapes"][shape].items()
        }
        best = min(times, key=lambda name: times[name])
        share, fraction = row["us"] / times[best], row["fraction_of_limit"]
        met = share <= PEER_SHARE or fraction >= PEER_LIMIT
        found.append(
            Verdict(
                "measured peers",
                shape,
                "uniform",
                T,
                f"<= {PEER_SHARE}x of {times[best]:g} us or >= {PEER_LIMIT:.0%} of limit",
                f"{share:.2f}x, {fraction:.1%}",
                met,
                best,
            )
        )
    return found
