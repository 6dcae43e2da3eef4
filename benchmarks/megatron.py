"""Megatron's graph-safe function against the Triton experts, on one GPU.

    python benchmarks/megatron.py --out benchmarks/results/h200/megatron.json

Experts scope (ids and weights given), uniform routing, bf16. One sample replays a CUDA graph that
goes through three sets of weights and of inputs, so that weights come from memory. ``megatron`` has
buffers of T rows, ``megatron_wide`` of ``WIDE`` rows, T of them valid and T as its hint.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from small_reports import columns, new_report

from fusedmoe.bench import SHAPES
from fusedmoe.bench.problems import Weights, random_weights
from fusedmoe.bench.replays import record, time_in_turns
from fusedmoe.bench.report import BenchReport, BenchRow, Percentiles, least_us
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.config import MoEOptions
from fusedmoe.experts.functional import fused_experts
from fusedmoe.integrations.megatron import ActivationType, vllm_fused_moe, vllm_fused_moe_reference
from fusedmoe.testing.routing import routing_logits
from fusedmoe.testing.tolerances import relative_error

DEVICE = torch.device("cuda")
SETS = 3
WIDE = 8192
CHECKED_TOKENS = 16
TRITON = MoEOptions(experts="triton")
Run = Callable[[], torch.Tensor]


class Problem(NamedTuple):
    shape: str
    activation: ActivationType
    T: int

    @property
    def layer(self) -> LayerShape:
        return replace(SHAPES[self.shape], activation=self.activation.moe_activation.value)

    @property
    def flops(self) -> float:
        return self.layer.flops(self.T)

    def limit_us(self, active_experts: float, ceilings: dict[str, Any]) -> float:
        """As ``bench.report.limit_us``."""
        layer = self.layer
        weights = layer.weight_elements / layer.E * active_experts
        moved = 2 * (weights + 2 * self.T * layer.H)
        return least_us(moved, self.flops, ceilings["read_gbs"], ceilings["bf16_tflops"])


class Batch(NamedTuple):
    """x [rows, H], probs fp32 and ids int32 [rows, k]; the first T rows count."""

    x: torch.Tensor
    probs: torch.Tensor
    ids: torch.Tensor
    valid: torch.Tensor


def make_weights(problem: Problem) -> list[Weights]:
    return random_weights(problem.layer, torch.bfloat16, DEVICE, SETS)


def make_batch(problem: Problem, seed: int, rows: int) -> Batch:
    """Rows past the T valid ones hold what a stray read would show."""
    T, layer = problem.T, problem.layer
    scores = routing_logits("uniform", T, layer.E, layer.k, seed, DEVICE).softmax(-1)
    picked, ids = scores.topk(layer.k, dim=-1)
    gen = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(T, layer.H, generator=gen, device=DEVICE).bfloat16()
    past = rows - T
    return Batch(
        torch.cat([x, x.new_full((past, layer.H), float("nan"))]),
        torch.cat([picked / picked.sum(-1, keepdim=True), picked.new_ones(past, layer.k)]),
        torch.cat([ids, ids.new_zeros(past, layer.k)]).int(),
        torch.tensor(T, dtype=torch.int32, device=DEVICE),
    )


def arguments(problem: Problem, one: Weights, batch: Batch) -> dict[str, Any]:
    return {
        "hidden_states": batch.x,
        "probs": batch.probs,
        "fc1_weight": one.w1,
        "fc2_weight": one.w2,
        "activation_type": problem.activation,
        "num_local_experts": problem.layer.E,
        "local_expert_start": 0,
        "valid_tokens": batch.valid,
        "routing_map": batch.ids,
    }


def contestants(problem: Problem, weights: list[Weights]) -> dict[str, list[Run]]:
    """Name -> one call per set of weights."""
    runs: dict[str, list[Run]] = {"megatron": [], "triton": []}
    act = problem.activation.moe_activation
    for seed, one in enumerate(weights):
        batch = make_batch(problem, seed, problem.T)
        runs["megatron"].append(partial(vllm_fused_moe, **arguments(problem, one, batch)))
        runs["triton"].append(
            partial(fused_experts, batch.x, one.w1, one.w2, batch.probs, batch.ids,
                    activation=act, options=TRITON)
        )  # fmt: skip
        if problem.T < WIDE:
            wide = arguments(problem, one, make_batch(problem, seed, WIDE))
            run = partial(vllm_fused_moe, **wide, num_tokens_hint=problem.T)
            runs.setdefault("megatron_wide", []).append(run)
    return runs


def warm(problem: Problem) -> None:
    """Compile what ``problem`` needs, into Triton's cache on disk."""
    for calls in contestants(problem, make_weights(problem)[:1]).values():
        calls[0]()
    torch.cuda.synchronize()


def error(problem: Problem, one: Weights, out: torch.Tensor) -> float:
    """Relative Frobenius error of the first tokens against fp64."""
    tokens = min(CHECKED_TOKENS, problem.T)
    batch = make_batch(problem, 0, problem.T)
    count = torch.tensor(tokens, dtype=torch.int32, device=DEVICE)
    part = Batch(batch.x[:tokens].double(), batch.probs[:tokens], batch.ids[:tokens], count)
    given = arguments(problem, one, part)
    return relative_error(out[:tokens], vllm_fused_moe_reference(**given)).frobenius


def measure(problem: Problem, report: BenchReport, weights: list[Weights], repeats: int) -> None:
    active = sum(make_batch(problem, seed, problem.T).ids.unique().numel() for seed in range(SETS))
    limit = problem.limit_us(active / SETS, report.header)
    runs = contestants(problem, weights)  # holds the inputs that the graphs read
    graphs = {
        name: replace(record(calls, limit, repeats), at_least=repeats)
        for name, calls in runs.items()
    }
    for name, taken in time_in_turns(graphs).items():
        found = error(problem, weights[0], graphs[name].graphs[0]())
        report.add(row_of(problem, name, taken, found, active / SETS, limit))


def row_of(
    problem: Problem, name: str, samples: list[float], found: float, active: float, limit: float
) -> BenchRow:
    layer, T = problem.layer, problem.T
    squared = problem.activation is ActivationType.SQUARED_RELU
    return BenchRow(
        impl=f"fusedmoe:{name}",
        **layer.columns | {"shape": layer.name + ("-squared-relu" if squared else "")},
        T=T,
        format="bf16",
        routing="uniform",
        active_experts=active,
        pairs=T * layer.k,
        scope="experts",
        timed="graph",
        **columns(Percentiles.of(samples), limit, problem.flops, found),
        runs=len(samples),
        workspace_bytes=None,
    )


def problems(tokens: list[int]) -> Iterator[list[Problem]]:
    """By layer, so that its weights are made once."""
    for shape, activation in (
        ("qwen3-30b", ActivationType.SWIGLU),
        ("qwen3-30b", ActivationType.SQUARED_RELU),
        ("mixtral", ActivationType.SWIGLU),
    ):
        yield [Problem(shape, activation, T) for T in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 8192])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--warm", type=int, metavar="N", help="only compile, in N processes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    groups = list(problems(args.tokens))
    if args.warm:
        with multiprocessing.get_context("spawn").Pool(args.warm, maxtasksperchild=1) as pool:
            pool.map(warm, [problem for several in groups for problem in several], 1)
        return
    report = new_report(DEVICE)
    with torch.inference_mode():
        for several in groups:
            torch.manual_seed(0)
            weights = make_weights(several[0])
            for problem in several:
                measure(problem, report, weights, args.repeats)
            del weights
            torch.cuda.empty_cache()
    for row in report.rows:
        print(
            f"{row['shape']:24} T {row['T']:5} {row['impl']:23} {row['us']:9.1f} us "
            f"[{row['p10_us']:.1f} {row['p90_us']:.1f}]  {row['fraction_of_limit']:.3f} of limit  "
            f"error {row['error']:.2e}"
        )
    if args.out is not None:
        report.write_with_csv(args.out)


if __name__ == "__main__":
    main()
