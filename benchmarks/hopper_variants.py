"""What other tiles would bring: the Hopper kernel and the tiles that a layer takes ("plain"), which
follow from its sizes alone, against others, in turns, in one call, with the results checked.

    python benchmarks/hopper_variants.py [--cells qwen3:8192 scout:2048:uniform qwen3-235b/8:8192]
        [--only group8 group16] [--pause 1] [--workers 14] [--out F]

A cell is shape[/ranks]:tokens[:routing]. From router logits, CUDA-graph replay, weights cold;
microseconds. ``loss`` is how much longer the plain tiles take than the fastest here. Decode's and
prefill's kernels must all give the same bits, and the plain tiles are held against fp64 on 8
tokens. ``/n``: the first of n ranks that hold E / n experts each, with the ids of the whole group.
``--pause``: rest after each sample as long as it took, times this, so that the card's power limit
stays away. ``--workers``: processes that compile everything first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_reports import columns, new_report, timed

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.bench import LayerShape
from fusedmoe.bench.problems import random_weights
from fusedmoe.bench.report import least_us
from fusedmoe.experts.hopper import hopper_experts, scratch_rows
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.kernels.routing import routing
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors
from fusedmoe.testing.routing import ROUTINGS, routing_logits
from fusedmoe.testing.tolerances import relative_error
from fusedmoe.tuning.hopper_space import LEAST_PREFILL_MEAN, MOST_DECODE_MEAN
from fusedmoe.tuning.hopper_tiles import (
    DecodeTiles,
    DirectTiles,
    HopperTiles,
    PrefillTiles,
    decode_tiles,
    decode_tiles_of,
    direct_tiles,
    drawn,
    hopper_tiles,
    may_be_direct,
)
from fusedmoe.tuning.table_file import write_atomically

DEVICE = torch.device("cuda")
NUMBERS = ApplyMoEActivationConfig()
SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("qwen3", 128, 8, 2048, 768),
        LayerShape("qwen3.6", 256, 8, 2048, 512),
        LayerShape("mixtral", 8, 2, 4096, 14336),
        LayerShape("gpt-oss", 128, 4, 2880, 2880, activation="swigluoai", bias=True),
        LayerShape("olmoe", 64, 8, 2048, 1024),
        LayerShape("scout", 16, 1, 5120, 8192),
        # The rules were adjusted on those above, not on these.
        LayerShape("qwen3-235b", 128, 8, 4096, 1536),
        LayerShape("qwen2-57b", 64, 8, 3584, 2560),
        LayerShape("deepseek-v2", 160, 6, 5120, 1536),
        LayerShape("glm-4.5-air", 128, 8, 4096, 1408),
        LayerShape("phi-3.5", 16, 2, 4096, 6400),
        LayerShape("minimax-01", 32, 2, 6144, 9216),
        LayerShape("dbrx", 16, 4, 6144, 10752),
        LayerShape("arctic", 128, 2, 7168, 4864),
    )
}
CHECKED_TOKENS = 8
CEILINGS = ("read_gbs", "copy_gbs", "bf16_tflops")


def variants_of(
    plain: HopperTiles, shape: LayerShape, ranks: int, T: int
) -> dict[str, HopperTiles]:
    """The plain tiles, tiles of other sizes, and the kernels for fewer and for more tokens."""
    local, mean = shape.E // ranks, T * shape.k / shape.E
    out: dict[str, HopperTiles] = {"plain": plain}
    slots = max(1, round(mean * local))
    streaming = decode_tiles(slots, local, shape.H, shape.I)
    if mean <= MOST_DECODE_MEAN:
        out["decode"] = streaming
    if mean >= LEAST_PREFILL_MEAN:
        out["prefill"] = PrefillTiles()
    if isinstance(plain, DecodeTiles):
        for up, down in itertools.product((32, 64, 128), (64, 128, 256)):
            tiles = decode_tiles_of(plain.block, up, down)
            out[f"up{up}-down{down}"] = drawn(tiles, min(slots, local), shape.H, shape.I)
        out["drawn" if not plain.draws_up else "dealt"] = replace(
            plain, draws_up=not plain.draws_up
        )
    if may_be_direct(T, shape.k):
        out["direct"] = direct_tiles(T, shape.k, shape.H, shape.I)
    if isinstance(plain, PrefillTiles):
        out |= {f"group{n}": replace(plain, group=n) for n in (8, 16, 64)}
    return {name: tiles for name, tiles in out.items() if name == "plain" or tiles != plain}


class Rank:
    """One rank's part of a layer, and everything a call needs, for T tokens."""

    def __init__(
        self, shape: LayerShape, ranks: int, T: int, routing_name: str, copies: int
    ) -> None:
        self.shape, self.T = shape, T
        self.local = shape.E // ranks
        here = replace(shape, E=self.local, all_experts=shape.E)
        self.weights = random_weights(here, torch.bfloat16, DEVICE, copies)
        self.activation = MoEActivation.from_str(shape.activation)
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
        rows = scratch_rows(PrefillTiles(), T * shape.k, self.local)
        self.first = self.x.new_empty(rows, shape.I)
        self.second = self.x.new_empty(rows, shape.H)

    def routed(self, index: int) -> RoutingResult:
        return routing(self.logits[index], self.spec, RoutingTensors())

    def call(self, tiles: HopperTiles, index: int) -> torch.Tensor:
        chosen = self.routed(index)
        return self.experts(tiles, index, chosen.topk_weights, chosen.topk_ids)

    def experts(
        self, tiles: HopperTiles, index: int, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        one = self.weights[index]
        work = ExpertsWork(
            self.out, self.x, one.w1, one.w2, topk_weights, topk_ids, self.activation,
            self.shape.E, self.map, workspace13=self.first, workspace2=self.second,
        )  # fmt: skip
        hopper_experts(work, NUMBERS, one.b1, one.b2, tiles=tiles)
        return self.out

    def result(self, tiles: HopperTiles) -> torch.Tensor:
        """Of the first weights and ids, from poisoned scratch."""
        for tensor in (self.out, self.first, self.second):
            tensor.fill_(float("nan"))
        return self.call(tiles, 0).clone()

    def reference(self) -> torch.Tensor:
        """In fp64, the first tokens alone."""
        one, chosen, few = self.weights[0], self.routed(0), slice(CHECKED_TOKENS)
        return experts_reference(
            self.x[few].double(), one.w1, one.w2,
            chosen.topk_weights[few], chosen.topk_ids[few], activation=self.activation,
            expert_map=self.map, w1_bias=one.b1, w2_bias=one.b2, compute_dtype=torch.float64,
        )  # fmt: skip

    def local_slots(self) -> float:
        """How many slots have an expert here, in the mean."""
        counts = [(self.routed(i).topk_ids < self.local).sum() for i in range(len(self.logits))]
        return float(torch.stack(counts).float().mean())

    def active_experts(self) -> float:
        """Experts here that have a slot, in the mean."""
        ids = [self.routed(i).topk_ids for i in range(len(self.logits))]
        return sum(one[one < self.local].unique().numel() for one in ids) / len(ids)

    def limit_us(self, flops: float, peak: dict[str, Any]) -> float:
        """As ``bench.report.limit_us``."""
        weights = self.active_experts() * self.shape.weight_elements / self.shape.E
        moved = 2 * (weights + 2 * self.T * self.shape.H)
        return least_us(moved, flops, peak["read_gbs"], peak["bf16_tflops"])


def compare(
    rank: Rank,
    routing_name: str,
    kinds: dict[str, HopperTiles],
    peak: dict[str, Any],
    pause: float,
    rounds: int,
) -> list[dict[str, object]]:
    """A row for each variant of this size."""
    shape = rank.shape
    outputs = {name: rank.result(tiles) for name, tiles in kinds.items()}
    exact = rank.reference()
    wrong = {
        name: relative_error(out[:CHECKED_TOKENS], exact).frobenius for name, out in outputs.items()
    }
    same = {name: out.equal(outputs["plain"]) for name, out in outputs.items()}
    direct = {name for name, tiles in kinds.items() if isinstance(tiles, DirectTiles)}
    if "plain" in direct:  # which round less often
        direct = set(kinds)
    same |= dict.fromkeys(direct, True)
    flops = shape.pair_flops * rank.local_slots()
    limit, sets = rank.limit_us(flops, peak), range(len(rank.weights))
    calls = {name: [partial(rank.call, tiles, i) for i in sets] for name, tiles in kinds.items()}
    rows: list[dict[str, object]] = []
    times = timed(calls, limit, rounds, DEVICE, pause)
    best = min(taken.us for taken in times.values())
    for name, taken in times.items():
        us, gain = taken.us, times["plain"].us / taken.us - 1
        print(
            f"{shape.name:11} T={rank.T:5} {routing_name:9} {name:13} {us:8.1f} us "
            f"{flops / us / 1e6:6.1f} TF  {limit / us:6.1%}  {100 * gain:+5.1f} %"
            + (f"  loses {us / best - 1:.1%}, error {wrong[name]:.1e}" if name == "plain" else "")
            + ("" if same[name] else "  OTHER BITS"),
            flush=True,
        )
        rows.append({
            "impl": f"fusedmoe:hopper[{name}]", "shape": shape.name, "E": rank.local,
            "num_experts": shape.E, "k": shape.k, "H": shape.H, "I": shape.I, "T": rank.T,
            "format": "bf16", "routing": routing_name, "scope": "layer",
            **columns(taken, limit, flops, wrong[name]), "loss": round(us / best - 1, 4),
            "tiles": {"kind": type(kinds[name]).__name__} | asdict(kinds[name]),
            "same_bits": same[name],
        })  # fmt: skip
    return rows


Cell = tuple[str, int, int, str]  # shape, ranks, tokens, routing


def parse_cell(text: str) -> Cell:
    """Raises ValueError for what is no cell."""
    name, tokens, *routing_name = text.split(":")
    name, _, ranks = name.partition("/")
    chosen = routing_name[0] if routing_name else "balanced"
    if name not in SHAPES or chosen not in ROUTINGS or len(routing_name) > 1:
        raise ValueError(f"{text!r} is not shape[/ranks]:tokens[:routing]")
    return name, int(ranks or 1), int(tokens), chosen


def tiles_of(cell: Cell, only: list[str] | None) -> dict[str, HopperTiles]:
    name, ranks, T, _ = cell
    shape = SHAPES[name]
    plain = hopper_tiles(T, shape.k, shape.E, shape.E // ranks, shape.H, shape.I)
    kinds = variants_of(plain, shape, ranks, T)
    return {n: kinds[n] for n in kinds if n == "plain" or only is None or n in only}


def compile_part(jobs: list[tuple[str, HopperTiles]]) -> None:
    """Run these tiles once, on layers of two experts."""
    for name, tiles in jobs:
        T = 1 if isinstance(tiles, DirectTiles) else 16
        rank = Rank(SHAPES[name], SHAPES[name].E // 2, T, "balanced", 1)
        rank.map, chosen = None, rank.routed(0)
        rank.experts(tiles, 0, chosen.topk_weights, chosen.topk_ids % rank.local)
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


def joined(paths: Sequence[str]) -> dict[str, Any]:
    """One report of several of the same commit and device; each row says which run it is of."""
    reports = [json.loads(Path(path).read_text()) for path in paths]
    for name in ("device", "versions", "commit"):
        if any(report[name] != reports[0][name] for report in reports):
            raise ValueError(f"reports of several: {[report[name] for report in reports]}")
    runs = [{key: report[key] for key in ("command", "date", *CEILINGS)} for report in reports]
    rows = [row | {"run": run} for run, report in enumerate(reports) for row in report["rows"]]
    return reports[0] | {"runs": runs, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", type=parse_cell, default=[parse_cell("qwen3:8192")])
    parser.add_argument("--only", nargs="+", help="these variants beside the plain tiles")
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out")
    parser.add_argument("--join", nargs="+", help="measure nothing: reports of several GPUs")
    args = parser.parse_args()
    if args.join:
        write_atomically(args.out, json.dumps(joined(args.join), indent=1) + "\n")
        return 0
    if args.workers:
        compile_all(args.cells, args.only, args.workers)
    report = new_report(DEVICE)
    print({name: round(report.header[name]) for name in CEILINGS}, flush=True)
    for cell in args.cells:
        name, ranks, T, routing_name = cell
        rank = Rank(SHAPES[name], ranks, T, routing_name, 3 if T <= 1024 else 2)
        kinds = tiles_of(cell, args.only)
        report.rows += compare(rank, routing_name, kinds, report.header, args.pause, args.rounds)
        del rank
        torch.cuda.empty_cache()
        if args.out:
            report.write(args.out)
    return 0 if all(row["same_bits"] for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
