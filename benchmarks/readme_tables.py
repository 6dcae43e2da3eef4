"""The numbers of README and of pages in docs/, from files in benchmarks/results.

    python benchmarks/readme_tables.py [--check]

Rewrites what lies between ``<!-- measured: NAME -->`` and ``<!-- end -->`` for every NAME of
``SECTIONS``; with ``--check`` it only says whether the pages are what the files say (exit code 1:
no).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scaling_tables
from scaling_tables import RESULTS, Row, table
from wire_targets import as_chosen

ROOT = Path(__file__).resolve().parent.parent
IN_DOCS = ("scaling.md", "formats.md", "megatron.md")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in IN_DOCS))
MARKED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)

LAYERS = {
    "qwen3-30b": "Qwen3-30B",
    "qwen3.6-35b": "Qwen3.6-35B",
    "olmoe": "OLMoE",
    "gpt-oss-120b": "gpt-oss-120b",
    "mixtral": "Mixtral-8x7B",
    "llama4-scout": "Llama-4-Scout",
}
MEGATRON = (
    ("qwen3-30b", "megatron", "Qwen3-30B (E 128, K 8, H 2048, I 768): this function"),
    ("qwen3-30b", "megatron_wide", "the same in buffers of 8192 rows"),
    ("qwen3-30b", "triton", "Triton experts"),
    ("qwen3-30b-squared-relu", "megatron", "the same with squared ReLU: this function"),
    ("qwen3-30b-squared-relu", "triton", "Triton experts"),
    ("mixtral", "megatron", "Mixtral-8x7B (E 8, K 2, H 4096, I 14336): this function"),
    ("mixtral", "triton", "Triton experts"),
)
QUANTIZED = (
    ("qwen3-30b", "fp8_block", "Qwen3-30B, fp8 blocks", (1, 8, 64, 8192)),
    ("qwen3-30b", "int4_g128", "Qwen3-30B, int4 groups of 128", (1, 8, 64, 8192)),
    ("mixtral", "int4_g128", "Mixtral-8x7B, int4 groups of 128", (1, 8, 64, 8192)),
    ("gpt-oss-120b", "mxfp4", "gpt-oss-120b, MXFP4", (1, 8, 64, 8192)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    texts = {path: path.read_text() for path in PAGES}
    found = {path: renewed(text) for path, text in texts.items()}
    if args.check:
        sys.exit(int(found != texts))
    for path, text in found.items():
        path.write_text(text)


def renewed(text: str) -> str:
    """``text`` with every marked section as the results say it now."""
    return MARKED.sub(lambda found: found[1] + SECTIONS[found[2]]() + found[3], text)


def rows_of(name: str) -> list[Row]:
    rows: list[Row] = json.loads((RESULTS / name).read_text())["rows"]
    return rows


def time_of(us: float) -> str:
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.0f} us"


def microseconds(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def cell_of(row: Row) -> str:
    """Time, then what it is a large part of: memory's rate, or a rate of products."""
    rate = f"{row['tflops']:.0f} TFLOP/s"
    share = f"{100 * row['fraction_of_limit']:.0f} %"
    return f"{time_of(row['us'])}, {rate if row['T'] >= 2048 else share}"


def layer_section() -> str:
    rows = [
        row
        for row in rows_of("h200/layer_table.json")
        if (row["routing"], row["scope"]) == ("balanced", "layer")
    ]
    body = []
    for shape, title in LAYERS.items():
        line = []
        for T in (1, 64, 8192):
            here = {row["impl"]: row for row in rows if (row["shape"], row["T"]) == (shape, T)}
            ours = here["fusedmoe"]
            peer = min(row["us"] for name, row in here.items() if name.startswith("transformers_"))
            line.append(f"{cell_of(ours)} ({peer / ours['us']:.1f})")
        sizes = f"E{ours['num_experts']} k{ours['k']} H{ours['H']} I{ours['I']}"
        body.append([f"{title} ({sizes})", *line])
    return table(["tokens", "1", "64", "8192"], body)


def quantized_section() -> str:
    found = {
        (row["shape"], row["format"], row["T"]): row
        for row in rows_of("h200/quantized.json")
        if (row["routing"], row["scope"], row["impl"]) == ("balanced", "layer", "fusedmoe")
    }
    body = [
        [title, *(cell_of(found[shape, fmt, T]) for T in tokens)]
        for shape, fmt, title, tokens in QUANTIZED
    ]
    return table(["tokens", "1", "8", "64", "8192"], body)


def formats_section() -> str:
    rows = rows_of("h200/packed_formats.json")
    tokens = sorted({row["T"] for row in rows})
    found = {(row["format"], row["T"]): row for row in rows}
    body = []
    for fmt in dict.fromkeys(row["format"] for row in rows):
        weights, _, rounded = fmt.partition("_by_")
        cells = [cell_of(found[fmt, T]) for T in tokens]
        error = max(found[fmt, T]["error"] for T in tokens)
        body.append([f"`{weights}`", rounded or "as they come", *cells, f"{error:.1e}"])
    return table(["weights", "rows", *(f"T = {T}" for T in tokens), "error"], body)


def megatron_section() -> str:
    rows = rows_of("h200/megatron.json")
    tokens = sorted({row["T"] for row in rows})
    found = {(row["shape"], row["impl"], row["T"]): row["us"] for row in rows}
    body = []
    for shape, way, title in MEGATRON:
        times = [found.get((shape, f"fusedmoe:{way}", T)) for T in tokens]
        body.append([title, *("-" if us is None else microseconds(us) for us in times)])
    return table(["bf16, tokens", *map(str, tokens)], body)


def wire_section() -> str:
    rows = [row for row in rows_of("h200-x4/all_to_all.json") if row["ranks"] == 4]
    rows = [as_chosen(row) for row in sorted(rows, key=lambda row: row["T"])]
    head = ["tokens per rank", *(str(row["T"]) for row in rows)]
    return table(
        head,
        [
            ["dispatch + combine", *(f"{row['us']:.1f} us" for row in rows)],
            [
                "times faster than NCCL's all-gather and reduce-scatter",
                *(f"{row['speedup_over_nccl']:.1f}" for row in rows),
            ],
        ],
    )


def cpu_section() -> str:
    problems: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows_of("cpu/layer.json"):
        key = tuple(row[name] for name in ("shape", "format", "routing", "T"))
        problems.setdefault(key, {})[row["impl"]] = row["us"]
    ratios = [
        min(us for name, us in times.items() if name.startswith("transformers_"))
        / times["fusedmoe"]
        for times in problems.values()
    ]
    return (
        f"On a 2-core CPU the layer takes between 1/{min(ratios):.1f} and 1/{max(ratios):.1f} of "
        "the time of the fastest of\nTransformers' three ways, in fp32 and bf16, "
        "at 1, 16 and 256 tokens\n"
        "([benchmarks/results/cpu/layer.json](benchmarks/results/cpu/layer.json)).\n"
    )


def generated(rows: list[dict[str, Any]]) -> str:
    """Tokens per second of ``accelerate`` and of the baseline, at each batch size."""
    speed = {(row["impl"], row["batch"]): float(f"{row['tokens_per_s']:.3g}") for row in rows}
    baseline, ours = "transformers_grouped_mm", "fusedmoe:accelerate"
    return " and ".join(
        f"{speed[ours, batch]:g} tokens/s of {speed[baseline, batch]:g} at batch {batch}"
        for batch in sorted({batch for impl, batch in speed if impl == ours})
    )


def model_section() -> str:
    rows, static = rows_of("h200/model_qwen3_30b.json"), "h200/model_qwen3_30b_static.json"
    forced = [row["teacher_forced"] for row in rows if row["impl"] == "fusedmoe:accelerate"]
    differ = sum(one["argmax_differs"] for one in forced)
    positions = sum(one["positions"] for one in forced)
    gap = max(one["gap_ulps_max"] for one in forced)
    return (
        "A model of Qwen3-30B-A3B's sizes with random bf16 weights, `generate` with the default "
        "cache and\nnothing compiled, against `grouped_mm` in the same run: "
        "`accelerate(model)` makes\n"
        f"{generated(rows)}. Teacher-forced on the\nbaseline's tokens, the argmax differs at "
        f"{differ} of {positions} positions, each with a top-2 gap of at most\n{gap:g} bf16 ulps\n"
        "([benchmarks/results/h200/model_qwen3_30b.json]"
        "(benchmarks/results/h200/model_qwen3_30b.json)). With a\nstatic cache, where `generate` "
        f"compiles the step into a CUDA graph:\n{generated(rows_of(static))}\n"
        f"([benchmarks/results/{static}](benchmarks/results/{static})).\n"
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "layer": layer_section,
    "quantized": quantized_section,
    "formats": formats_section,
    "megatron": megatron_section,
    "wire": wire_section,
    "cpu": cpu_section,
    "model": model_section,
} | scaling_tables.SECTIONS

if __name__ == "__main__":
    main()
