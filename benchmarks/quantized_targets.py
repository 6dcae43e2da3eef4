"""What quantized layers have to reach on one H200, as data, and which of a report's rows do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from verdicts import Row, Verdict, is_met, on_measured_peers, words_of

from fusedmoe.bench import LayerShape
from fusedmoe.bench.problems import Scope
from fusedmoe.bench.shapes import SHAPES as KNOWN
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    MXFP4_DYNAMIC,
    MXFP6_E3M2_DYNAMIC,
    MXFP8_DYNAMIC,
    NVFP4_DYNAMIC,
    QuantKey,
)

PEER_CELLS = Path(__file__).with_name("peers_h200_quantized.json")
BLOCK, BESIDE_BLOCK = "fp8_block", ("fp8_channel", "fp8_tensor")
"""Scales that cover more are to be no slower than blocks', and faster where products decide."""
FASTER_FROM, FASTER, NO_SLOWER = 8192, 1.1, 0.98  # 2 % are noise
SKEWED, SKEW_LOSS, SKEW_FROM = "power_law_1.2", 0.10, 2048
BITS = {"fp8_block": 8, "fp8_channel": 8, "fp8_tensor": 8, "int4_g128": 4, "mxfp4": 4}
"""Formats that are held against measured peers, by the width of weights that these share."""


class Cell(NamedTuple):
    """One problem of one layer."""

    routing: str
    scope: Scope
    T: int


@dataclass(frozen=True)
class Target:
    """Balanced routing, from router logits. ``kind``: ``us`` at most, ``fraction`` (of the limit)
    or ``tflops`` at least."""

    shape: str
    format: str
    tokens: tuple[int, ...]
    kind: str
    value: float


ROWS: dict[str, QuantKey] = {
    "fp8_block": FP8_DYNAMIC_128,
    "fp8_channel": FP8_DYNAMIC_TOKEN,
    "fp8_tensor": FP8_STATIC_TENSOR,
    "int8_channel": INT8_DYNAMIC_TOKEN,
    "int4_g128_by_fp8": FP8_DYNAMIC_TOKEN,
    "nvfp4_by_nvfp4": NVFP4_DYNAMIC,
    "mxfp4_by_mxfp4": MXFP4_DYNAMIC,
    "mxfp8_by_mxfp8": MXFP8_DYNAMIC,
    "mxfp6_e3m2_by_mxfp6": MXFP6_E3M2_DYNAMIC,
}
"""How rows are quantized beside these weights; rows of the others stay as they come."""

SHAPES: dict[str, LayerShape] = KNOWN | {
    shape.name: shape
    for shape in (
        LayerShape("kimi-k2-tp8", 384, 8, 7168, 256),
        LayerShape("256x6x4096x2048", 256, 6, 4096, 2048),
    )
}

TARGETS = (
    Target("qwen3-30b", "fp8_block", (1,), "us", 17),
    Target("qwen3-30b", "fp8_block", (8,), "us", 85),
    Target("qwen3-30b", "fp8_block", (16, 64, 128), "fraction", 0.90),
    Target("qwen3-30b", "fp8_block", (8192, 16384), "tflops", 850),
    Target("deepseek-v3-ep8", "fp8_block", (2048,), "tflops", 1020),
    Target("deepseek-v3-ep8", "fp8_block", (4096,), "tflops", 1100),
    Target("deepseek-v3-ep8", "fp8_block", (8192,), "tflops", 1150),
    Target("256x6x4096x2048", "fp8_block", (64,), "fraction", 0.95),
    Target("256x6x4096x2048", "fp8_block", (16384,), "tflops", 1000),
    Target("gpt-oss-120b", "mxfp4", (1,), "us", 22),
    Target("gpt-oss-120b", "mxfp4", (8,), "us", 125),
    Target("gpt-oss-120b", "mxfp4", (32, 64, 128), "us", 455),
    Target("gpt-oss-120b", "mxfp4", (4096,), "tflops", 550),
    Target("gpt-oss-120b", "mxfp4", (8192, 16384), "tflops", 600),
    Target("kimi-k2-tp8", "int4_g32", (1,), "us", 13),
    Target("kimi-k2-tp8", "int4_g32", (16,), "us", 110),
    Target("kimi-k2-tp8", "int4_g32", (64,), "us", 310),
    Target("qwen3-30b", "int4_g128", (1,), "us", 14),
    Target("qwen3-30b", "int4_g128", (8,), "us", 45),
    Target("qwen3-30b", "int4_g128", (64,), "us", 85),
    Target("qwen3-30b", "int4_g128", (8192,), "tflops", 500),
    Target("mixtral", "int4_g128", (1,), "us", 60),
    Target("mixtral", "int4_g128", (8,), "us", 180),
    Target("mixtral", "int4_g128", (64,), "us", 205),
    Target("mixtral", "int4_g128", (8192,), "tflops", 550),
    Target("qwen3-30b", "int8_channel", (64,), "fraction", 0.90),
    Target("qwen3-30b", "int8_channel", (8192,), "tflops", 850),
    Target("mixtral", "int8_channel", (64,), "fraction", 0.90),
    Target("mixtral", "int8_channel", (8192,), "tflops", 1000),
)


@cache
def peer_cells() -> dict[str, Any]:
    return json.loads(PEER_CELLS.read_text())


def cells_asked() -> dict[tuple[str, str], list[Cell]]:
    """By (shape, format): the targets' problems, the same ones skewed, and those of the peers."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for target in TARGETS:
        own = found.setdefault((target.shape, target.format), [])
        own += [Cell("balanced", "layer", T) for T in target.tokens]
        own += [Cell(SKEWED, "layer", T) for T in target.tokens if T >= SKEW_FROM]
    for shape, fmt in tuple(found):
        if fmt == BLOCK:
            found |= {(shape, other): list(found[shape, BLOCK]) for other in BESIDE_BLOCK}
    peers = peer_cells()
    for fmt, bits in BITS.items():
        for shape in peers["bits"][str(bits)]:
            group = format_named(fmt).group
            if group.row == 1 and group.col > 0 and SHAPES[shape].H % group.col:
                continue  # blocks may end beyond a row, groups may not
            own = found.setdefault((shape, fmt), [])
            own += [Cell("uniform", "experts", T) for T in peers["tokens"]]
    return {key: list(dict.fromkeys(found[key])) for key in sorted(found)}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Everything asked of a measured problem, the fastest of ours counting."""
    best: dict[tuple[str, str, Cell], Row] = {}
    for row in sorted(rows, key=lambda row: -row["us"]):
        best[row["shape"], row["format"], Cell(row["routing"], row["scope"], row["T"])] = row
    found = []
    for target in TARGETS:
        for T in target.tokens:
            own = best.get((target.shape, target.format, Cell("balanced", "layer", T)))
            if own is not None:
                asked, measured = words_of(target.kind, target.value), _measured(own)
                found.append(
                    _verdict("target", own, asked, measured, is_met(target.kind, target.value, own))
                )
    for (shape, fmt, cell), row in best.items():
        even = best.get((shape, fmt, cell._replace(routing="balanced")))
        block = best.get((shape, BLOCK, cell))
        if (cell.routing, cell.scope) == ("balanced", "layer") and fmt in BESIDE_BLOCK and block:
            least = FASTER if cell.T >= FASTER_FROM else NO_SLOWER
            have = block["us"] / row["us"]
            asked = f">= {least:g}x of blocks"
            found.append(_verdict("beside blocks", row, asked, f"{have:.2f}x", have >= least))
        if cell.routing == SKEWED and cell.scope == "layer" and even is not None:
            loss = 1 - row["tflops"] / even["tflops"]
            asked = f"loses < {SKEW_LOSS:.0%}"
            found.append(_verdict("skew", row, asked, f"{loss:.1%}", loss < SKEW_LOSS))
        if cell.routing == "uniform" and cell.scope == "experts" and fmt in BITS:
            peers = peer_cells()
            own = peers["bits"][str(BITS[fmt])].get(shape, {})
            found += on_measured_peers(row, own, peers["tokens"])
    return found


def _measured(row: Row) -> str:
    return f"{row['us']:.1f} us, {row['fraction_of_limit']:.1%}, {row['tflops']:.0f} TF"


def _verdict(
    what: str, row: Row, asked: str, measured: str, is_met: bool, detail: str = ""
) -> Verdict:
    place = row["shape"], row["routing"], row["T"]
    return Verdict(what, *place, asked, measured, is_met, detail, row["format"])
