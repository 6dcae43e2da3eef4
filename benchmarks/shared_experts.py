"""Shared experts on a second stream, beside the routed ones, against one after the other.

    python benchmarks/shared_experts.py [--out benchmarks/results/h200/shared_experts.json]

CUDA-graph replays of the layer from router logits; DeepSeek-V3 has one shared expert of the routed
size, Qwen2-MoE one of four times that with a gate of its own. ``overlap`` and ``sequence`` force
either order, ``chosen`` is what the layer does by itself.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from small_reports import columns, new_report, timed
from torch import nn

from fusedmoe import MoEOptions
from fusedmoe.bench import BenchReport, LayerShape
from fusedmoe.bench.contestants import build_layer
from fusedmoe.bench.problems import Cell, Problem, random_weights
from fusedmoe.bench.report import least_us, limit_us
from fusedmoe.testing.tolerances import relative_error

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)
SITUATIONS = 4
NOISE = 1.01


@dataclass(frozen=True)
class Model:
    """A layer, the width of its shared experts, and whether a gate weighs them."""

    layer: LayerShape
    shared: int
    gated: bool


MODELS = {
    model.layer.name: model
    for model in (
        Model(LayerShape("deepseek-v3", 256, 8, 7168, 2048), 2048, gated=False),
        Model(LayerShape("qwen2-moe", 60, 4, 2048, 1408), 5632, gated=True),
        Model(LayerShape("tiny", 8, 2, 64, 32), 48, gated=True),
    )
}


class SharedExperts(nn.Module):
    """silu(gate) * up, then down: [T, H] -> [T, H]."""

    def __init__(self, H: int, I: int) -> None:  # noqa: E741
        super().__init__()
        self.gate_up = nn.Linear(H, 2 * I, bias=False)
        self.down = nn.Linear(I, H, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(torch.nn.functional.silu(gate) * up)


def exact_shared(shared: nn.Module, gate: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """What the shared experts add, in fp64: [T, H]."""
    found: torch.Tensor = deepcopy(shared).double()(x.double())
    return found if gate is None else found * deepcopy(gate).double()(x.double()).sigmoid()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["deepseek-v3", "qwen2-moe"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    device = torch.device(args.device)
    report = new_report(device)
    for name in args.models:
        measure(report, MODELS[name], args.tokens, device, args.repeats)
    if args.out:
        report.write(args.out)


@torch.inference_mode()
def measure(
    report: BenchReport, model: Model, tokens: list[int], device: torch.device, repeats: int
) -> None:
    """Four rows per token count."""
    shape = model.layer
    (weights,) = random_weights(shape, torch.bfloat16, device, 1)
    with device:
        shared = SharedExperts(shape.H, model.shared).to(torch.bfloat16)
        gate = nn.Linear(shape.H, 1, bias=False).to(torch.bfloat16) if model.gated else None
    # The routed experts of different situations push the shared ones out of the cache.
    layers = {
        order: build_layer(
            shape,
            weights,
            MoEOptions(),
            shared_experts=shared,
            shared_expert_gate=gate,
            runner_args=forced,
        )
        for order, forced in (
            ("sequence", {"shared_overlap_token_limit": 0}),
            ("overlap", {"shared_overlap_token_limit": 1 << 30}),
            ("chosen", {}),
        )
    }
    plain = build_layer(shape, weights, MoEOptions())
    for T in tokens:
        problem = Problem.of(Cell(shape, torch.bfloat16, "uniform", T), SITUATIONS, device)
        rates = report.header["read_gbs"], report.header["bf16_tflops"]
        limit = limit_us(problem, *rates)
        variants = {
            order: [partial(layer, problem.x, one.logits) for one in problem.situations]
            for order, layer in (layers | {"routed_alone": plain}).items()
        }
        times = timed(variants, limit, repeats, device)
        outputs = {name: calls[0]() for name, calls in variants.items()}
        if not all(torch.equal(outputs["sequence"], outputs[order]) for order in layers):
            raise RuntimeError(f"{shape.name} T={T}: the orders give different bits")
        tokens, exact = problem.exact(weights)
        sums = {"routed_alone": exact}
        sums |= dict.fromkeys(layers, exact + exact_shared(shared, gate, problem.x[tokens]))
        shared_flops = 6.0 * T * shape.H * model.shared
        shared_us = least_us(6.0 * shape.H * model.shared, shared_flops, *rates)
        base = times["sequence"].us
        for order, taken in times.items():
            report.rows.append(
                {"impl": f"fusedmoe[{order}]", "shape": shape.name, "E": shape.E, "k": shape.k}
                | {"H": shape.H, "I": shape.I, "shared_I": model.shared, "T": T, "format": "bf16"}
                | {"routing": "uniform", "scope": "layer"}
                | columns(
                    taken,
                    limit + (shared_us if order in layers else 0.0),
                    problem.flops + (shared_flops if order in layers else 0.0),
                    relative_error(outputs[order][tokens], sums[order]).frobenius,
                )
                | {"gain": round(base / taken.us, 3)}
            )
        mark = "met   " if times["chosen"].us <= base * NOISE else "MISSED"
        print(
            f"{mark} {shape.name:12} T={T:<5} "
            + ", ".join(f"{order} {taken.us:.1f}" for order, taken in times.items())
            + f" us; overlap gains {base / times['overlap'].us - 1:+.1%}, "
            f"chosen {base / times['chosen'].us - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
