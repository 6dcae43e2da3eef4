"""One MoE layer on the CPU, from router logits to output, against Transformers' experts.

    python benchmarks/cpu_layer.py [--out benchmarks/results/cpu/layer.json]

Qwen3-30B, OLMoE and a quarter-width Mixtral, T = 1, 16, 256, in fp32 and bf16: interleaved runs,
medians, and the ratio of the fastest peer's time to ours (above 1: ours is faster). Run it on a
machine that does nothing else: products over several cores wait for their slowest thread.
"""

from __future__ import annotations

import argparse
import sys

import torch

from fusedmoe.bench import SHAPES, BenchReport, run_layer_bench
from fusedmoe.testing.routing import ROUTINGS

LAYERS = ("qwen3-30b", "olmoe", "mixtral-quarter")
TOKENS = (1, 16, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_DTYPES = ("fp32", "bf16")


def print_ratios(report: BenchReport, ours: list[str]) -> None:
    """A line per problem: ours, the fastest peer, and the ratio."""
    for name in ours:
        for row in report.ratios(ours=name):
            problem = f"{row['shape']:16} {row['format']} {row['routing']:8} T={row['T']:<5}"
            print(f"{name:24} {problem} {row['ratio']:6.2f}x {row['fastest_peer']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="where to write the report, as JSON")
    parser.add_argument("--shapes", nargs="+", default=LAYERS, choices=sorted(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", default=DEFAULT_DTYPES, choices=sorted(DTYPES))
    parser.add_argument("--routings", nargs="+", default=["uniform"], choices=ROUTINGS)
    parser.add_argument("--experts", nargs="*", default=[], help="more of our implementations")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    report = run_layer_bench(
        [SHAPES[name] for name in args.shapes],
        args.tokens,
        [DTYPES[name] for name in args.dtypes],
        args.routings,
        repeats=args.repeats,
        progress=lambda done, total, what: print(f"[{done}/{total}] {what}", file=sys.stderr),
        experts=(None, *args.experts),
    )
    print_ratios(report, ["fusedmoe", *(f"fusedmoe:{name}" for name in args.experts)])
    for note in report.notes:
        print(f"note: {note}")
    if args.out:
        report.write(args.out)


if __name__ == "__main__":
    main()
