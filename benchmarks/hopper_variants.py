"""What each optional field of the Hopper tiles is worth: every variant against the plain tiles, in
turns, in one call, with its result checked.

    python benchmarks/hopper_variants.py [--cells qwen3:8192 scout:2048:uniform qwen3-235b/8:8192]
        [--only group8 group16] [--pause 1] [--workers 14] [--out F]

A cell is shape[/ranks]:tokens[:routing]. From router logits, CUDA-graph replay, weights cold;
microseconds. Every variant must give the bits of the plain tiles, and those are held against fp64
on 8 tokens. ``/n``: the first of n ranks that hold E / n experts each, with the ids of the whole
group. ``--pause``: rest after each sample as long as it took, times this, so that the card's power
limit stays away. ``--workers``: processes that compile everything first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from dataclasses import asdict, replace
from functools import partial

import torch
from hopper_kernels import (
    DEVICE,
    SHAPES,
    Layer,
    Shape,
    balanced_ids,
    ceilings,
    error,
    graph_times,
    halves,
)

from fusedmoe.activation import ApplyMoEActivationConfig
from fusedmoe.experts.hopper import hopper_experts, scratch_rows
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.kernels.routing import routing
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors
from fusedmoe.testing.routing import ROUTINGS, routing_logits
from fusedmoe.tuning.hopper_tiles import HopperTiles, PrefillTiles, hopper_tiles

NUMBERS = ApplyMoEActivationConfig()
SHAPES_HERE = SHAPES | {"qwen3-235b": Shape("qwen3-235b", 128, 8, 4096, 1536)}
CHECKED_TOKENS = 8


def variants_of(plain: HopperTiles) -> dict[str, HopperTiles]:
    """The plain tiles, each field by itself, and what is expected to be best."""
    out: dict[str, HopperTiles] = {"plain": plain}
    if isinstance(plain, PrefillTiles):
        out |= {f"group{n}": replace(plain, group=n) for n in (8, 16, 64)}
    return out


class Rank:
    """One rank's part of a layer, and everything a call needs, for T tokens."""

    def __init__(self, shape: Shape, ranks: int, T: int, routing_name: str, copies: int) -> None:
        self.shape, self.T, self.ranks = shape, T, ranks
        self.local = shape.E // ranks
        self.layers = [Layer(replace(shape, E=self.local)) for _ in range(copies)]
        self.map = None
        if ranks > 1:
            self.map = torch.full((shape.E,), -1, dtype=torch.int32, device=DEVICE)
            self.map[: self.local] = torch.arange(self.local, device=DEVICE)
        self.spec = RoutingSpec(top_k=shape.k, num_experts=shape.E, renormalize=True)
        self.logits = [
            routing_logits(routing_name, T, shape.E, shape.k, seed, DEVICE).bfloat16()
            for seed in range(copies)
        ]
        self.x = torch.randn(T, shape.H, device=DEVICE).bfloat16()
        self.out = torch.empty_like(self.x)
        sizes = (T, shape.k, shape.E, self.local, shape.H, shape.I)
        self.plain = hopper_tiles(*sizes)
        rows = scratch_rows(self.plain, T * shape.k, self.local)
        self.first = self.x.new_empty(rows, shape.I)
        self.second = self.x.new_empty(rows, shape.H)

    def routed(self, index: int) -> RoutingResult:
        return routing(self.logits[index], self.spec, RoutingTensors())

    def call(self, tiles: HopperTiles, index: int) -> None:
        layer, chosen = self.layers[index], self.routed(index)
        work = ExpertsWork(
            self.out, self.x, layer.w1, layer.w2, chosen.topk_weights, chosen.topk_ids,
            self.shape.activation, self.shape.E, self.map, workspace13=self.first,
            workspace2=self.second,
        )  # fmt: skip
        hopper_experts(work, NUMBERS, layer.b1, layer.b2, tiles=tiles)

    def result(self, tiles: HopperTiles) -> torch.Tensor:
        """Of the first weights and ids, from poisoned scratch."""
        for tensor in (self.out, self.first, self.second):
            tensor.fill_(float("nan"))
        self.call(tiles, 0)
        return self.out.clone()

    def reference(self) -> torch.Tensor:
        """In fp64, the first tokens alone."""
        layer, chosen, few = self.layers[0], self.routed(0), slice(CHECKED_TOKENS)
        return experts_reference(
            self.x[few].double(), layer.w1.double(), layer.w2.double(),
            chosen.topk_weights[few], chosen.topk_ids[few], activation=self.shape.activation,
            expert_map=self.map, w1_bias=layer.b1, w2_bias=layer.b2,
            compute_dtype=torch.float64,
        )  # fmt: skip

    def local_slots(self) -> float:
        """How many slots have an expert here, in the mean."""
        counts = [(self.routed(i).topk_ids < self.local).sum() for i in range(len(self.logits))]
        return float(torch.stack(counts).float().mean())


def compare(
    rank: Rank, routing_name: str, kinds: dict[str, HopperTiles], pause: float, rounds: int
) -> list[dict[str, object]]:
    """A row for each variant of this size."""
    shape = rank.shape
    right = rank.result(rank.plain)
    wrong = error(right[:CHECKED_TOKENS], rank.reference())
    same = {name: rank.result(tiles).equal(right) for name, tiles in kinds.items()}
    flops = halves(shape) * 2 * rank.local_slots() * shape.H * shape.I
    sets = range(len(rank.layers))
    calls = {name: [partial(rank.call, tiles, i) for i in sets] for name, tiles in kinds.items()}
    rows: list[dict[str, object]] = []
    times = graph_times(calls, rounds, pause=pause)
    for name, (us, p10, p90) in times.items():
        gain = times["plain"][0] / us - 1
        print(
            f"{shape.name:10} T={rank.T:5} {routing_name:13} {name:8} {us:8.1f} us "
            f"{flops / us / 1e6:6.1f} TF  {100 * gain:+5.1f} %  error {wrong:.1e}"
            + ("" if same[name] else "  OTHER BITS"),
            flush=True,
        )
        rows.append({
            "impl": f"hopper:{name}", "shape": shape.name, "ranks": rank.ranks, "T": rank.T,
            "routing": routing_name, "us": us, "p10_us": p10, "p90_us": p90, "gain": gain,
            "tflops": flops / us / 1e6, "tiles": asdict(kinds[name]), "same_bits": same[name],
            "error": wrong,
        })  # fmt: skip
    return rows


Cell = tuple[str, int, int, str]  # shape, ranks, tokens, routing


def parse_cell(text: str) -> Cell:
    """Raises ValueError for what is no cell."""
    name, tokens, *routing_name = text.split(":")
    name, _, ranks = name.partition("/")
    chosen = routing_name[0] if routing_name else "balanced"
    if name not in SHAPES_HERE or chosen not in ROUTINGS or len(routing_name) > 1:
        raise ValueError(f"{text!r} is not shape[/ranks]:tokens[:routing]")
    return name, int(ranks or 1), int(tokens), chosen


def tiles_of(cell: Cell, only: list[str] | None) -> dict[str, HopperTiles]:
    name, ranks, T, _ = cell
    shape = SHAPES_HERE[name]
    plain = hopper_tiles(T, shape.k, shape.E, shape.E // ranks, shape.H, shape.I)
    kinds = variants_of(plain)
    return {n: kinds[n] for n in kinds if n == "plain" or only is None or n in only}


def compile_part(jobs: list[tuple[str, HopperTiles]]) -> None:
    """Run these tiles once, on layers of two experts."""
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    for name, tiles in jobs:
        layer = Layer(replace(SHAPES_HERE[name], E=2))
        T = 16
        layer.run(balanced_ids(T, 2, layer.shape.k), tiles, programs, layer.scratch(T))
        torch.cuda.synchronize()


def compile_all(cells: list[Cell], only: list[str] | None, workers: int) -> None:
    """Before this process has touched the GPU: processes that do so cannot be forked."""
    found = {(cell[0], tiles) for cell in cells for tiles in tiles_of(cell, only).values()}
    jobs = sorted(found, key=str)
    context = multiprocessing.get_context("fork")
    parts = [jobs[i::workers] for i in range(min(workers, len(jobs)))]
    running = [context.Process(target=compile_part, args=(part,)) for part in parts]
    for process in running:
        process.start()
    for process in running:
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", type=parse_cell, default=[parse_cell("qwen3:8192")])
    parser.add_argument("--only", nargs="+", help="these variants beside the plain tiles")
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.workers:
        compile_all(args.cells, args.only, args.workers)
    peak = ceilings()
    print({name: round(value) for name, value in peak.items()}, flush=True)
    rows = []
    for cell in args.cells:
        name, ranks, T, routing_name = cell
        rank = Rank(SHAPES_HERE[name], ranks, T, routing_name, 3 if T <= 1024 else 2)
        rows += compare(rank, routing_name, tiles_of(cell, args.only), args.pause, args.rounds)
        del rank
        torch.cuda.empty_cache()
    if args.out:
        with open(args.out, "w") as file:
            json.dump(peak | {"rows": rows}, file, indent=1)
    return 0 if all(row["same_bits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
