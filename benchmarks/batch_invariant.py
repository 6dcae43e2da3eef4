"""What it costs that a token's bits do not depend on its batch: gate, router and experts.

    python benchmarks/batch_invariant.py [--out benchmarks/results/h200/batch_invariant.json]

CUDA-graph replays from hidden states (bf16 gate with fp32 logits included), several sets of
weights. Asked: at most 1.3 times the default up to 128 tokens, 1.2 times above.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from small_reports import columns, new_report, timed

from fusedmoe import GateLinear, MoEOptions
from fusedmoe.bench import SHAPES, BenchReport, LayerShape
from fusedmoe.bench.contestants import build_layer
from fusedmoe.bench.problems import Cell, Problem, Weights, pick, random_weights
from fusedmoe.bench.report import limit_us

TOKENS = (1, 2, 8, 32, 64, 128, 512, 2048, 4096)
COPIES = 3


def asked_ratio(T: int) -> float:
    return 1.3 if T <= 128 else 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b", "mixtral"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    device = torch.device(args.device)
    report = new_report(device)
    for name in args.shapes:
        shape = SHAPES[name]
        weights = random_weights(shape, torch.bfloat16, device, COPIES)
        for T in args.tokens:
            measure(report, shape, weights, T, device, args.repeats)
        del weights
    if args.out:
        report.write(args.out)


def measure(
    report: BenchReport,
    shape: LayerShape,
    weights: list[Weights],
    T: int,
    device: torch.device,
    repeats: int,
) -> None:
    """A row for the default and one for the invariant layer."""
    cell = Cell(shape, torch.bfloat16, "uniform", T)
    xs = [torch.randn(T, shape.H, device=device).to(torch.bfloat16) for _ in weights]
    variants, problems = {}, {}
    for invariant in (False, True):
        with device:
            gate = GateLinear(
                shape.H,
                shape.num_experts,
                out_dtype=torch.float32,
                params_dtype=torch.bfloat16,
                batch_invariant=invariant,
            )
        torch.manual_seed(1)
        gate.reset_parameters()
        layers = [
            build_layer(shape, one, MoEOptions(batch_invariant=invariant), gate=gate)
            for one in weights
        ]
        name = "fusedmoe[batch_invariant]" if invariant else "fusedmoe"
        variants[name] = [partial(layer, x) for layer, x in zip(layers, xs, strict=True)]
        problems[name] = Problem(cell, xs[0], [pick(gate(x), shape.k) for x in xs])
    limits = {
        name: limit_us(one, report.header["read_gbs"], report.header["bf16_tflops"])
        for name, one in problems.items()
    }
    times = timed(variants, min(limits.values()), repeats, device)
    with torch.inference_mode():
        outputs = {name: calls[0]() for name, calls in variants.items()}
    base, invariant_us = (times[name].us for name in variants)
    for name, taken in times.items():
        report.rows.append(
            {"impl": name, "shape": shape.name, "E": shape.E, "k": shape.k, "H": shape.H}
            | {"I": shape.I, "T": T, "format": "bf16", "routing": "uniform", "scope": "layer"}
            | columns(
                *(taken, limits[name], problems[name].flops),
                problems[name].error(weights[0], outputs[name]),
            )
            | {"ratio": round(taken.us / base, 3)}
        )
    ratio = invariant_us / base
    mark = "met   " if ratio <= asked_ratio(T) else "MISSED"
    print(f"{mark} {shape.name:12} T={T:<5} {base:8.1f} us -> {invariant_us:8.1f} us, {ratio:.2f}x")


if __name__ == "__main__":
    main()
