"""A whole layer over the GPUs of one host, against its experts alone and the wire's limit.

    torchrun --nproc-per-node 4 benchmarks/ep_layer.py [--shapes deepseek-v3 qwen3-235b]
        [--tokens 8 128 1024 8192] [--format bf16 | fp8_block] [--ranks 1 2 4]
        [--ways peer naive_dp_ep ...] [--experts NAME]
        [--out benchmarks/results/h200-x4/ep_layer.json] [--join FILE ...]

Routing is uniform, every rank brings the same number of tokens, each with its own. Per number of
ranks (the first so many of the processes), two kinds of rows:

    layer      from router logits, by each way to move tokens; ``+halves``: in two micro-batches;
               ``peer`` goes by the number of tokens: ``+fetched`` leaves sums to be fetched,
               ``+sent`` has them go to their tokens' ranks as they are made, ``+pushed`` the row of
               each pick, from within the second product; ``+copied`` sends sums, and the copy
               engines bring rows while the experts compute
    experts    ``local_experts``: this rank's experts on the tokens of all ranks, which are here
               already (quantizing them included); what the layer would be without a wire

``limit_us``: of the experts on this rank, the larger of their bytes (those that some token picks)
and their FLOPs at the rates of the header. ``wire_limit_us``: bytes sent and received, one copy per
(token, rank), at ``p2p_gbs``, measured in the same run. ``exposed_us``: the layer minus its experts
alone. ``overlap_limit_us``: 1.15 times the larger of experts and wire, plus 20 us, which is asked
from 1024 tokens on (``target_met``). ``scaling``: tokens per second and rank, over those of one
rank with all experts. ``error``: relative (Frobenius), against the sum over ranks of their experts
alone. A time is that of the slowest rank, on GPUs from replays of CUDA graphs where the way can be
captured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ep_wire import Place, time_call, wire_gbs, wire_limit_us
from quantized_layer import OneFormat, eight_bit_rates

from fusedmoe import FusedMoE, MoEOptions, ParallelGroups
from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.over_ranks import COMPILING_S, no_peer_memory, peer_layout
from fusedmoe.bench.report import BenchReport, Percentiles, least_us, make_header
from fusedmoe.bench.shapes import SHAPES, LayerShape
from fusedmoe.cli.ranks import launched_ranks
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.modular_kernel import FusedMoEKernel
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.keys import FP8_DYNAMIC_128
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.selection import explain, name_of
from fusedmoe.testing.routing import routing_logits

TINY = LayerShape("tiny", 8, 2, 64, 32)
PEERS: dict[str, dict[str, Any]] = {
    "": {},
    "fetched": {"send_sums_from": None, "push_rows_from": None, "copy_rows_from": None},
    "sent": {"send_sums_from": 1, "push_rows_from": None, "copy_rows_from": None},
    "pushed": {"send_sums_from": 1, "push_rows_from": 1, "copy_rows_from": None},
    "copied": {"send_sums_from": 1, "push_rows_from": None, "copy_rows_from": 1},
}
CAPTURED = ("peer", "naive_dp_ep", "no_ep")
OVERLAP_FROM, OVERLAP_FACTOR, OVERLAP_SLACK_US = 1024, 1.15, 20.0


def make_layer(
    shape: LayerShape,
    fmt: str,
    place: Place,
    name: str,
    memory: PeerMemory | None = None,
    experts: str | None = None,
) -> MoERunner:
    """With random weights; ``name`` is one of ``ways_of``, "no_ep" a layer of one rank."""
    way, *how = name.split("+")
    group = None if way == "no_ep" else place.group
    layer = FusedMoE(
        *(shape.num_experts, shape.k, shape.H, shape.I, torch.bfloat16),
        quant_config=OneFormat(fmt) if fmt == "fp8_block" else None,
        parallel=ParallelGroups(
            dp=group, ep=group, enable_expert_parallel=group is not None, peers=memory
        ),
        options=MoEOptions(
            prepare_finalize=way,
            experts=experts,
            micro_batch_tokens=2 if "halves" in how else None,
        ),
        device=place.device,
    )
    for row in layer.routed_experts.parameters():
        for expert in row:
            if expert.dtype is torch.float32:
                expert.uniform_(0.5e-3, 1e-3)
            elif expert.dtype is torch.bfloat16:
                expert.normal_(std=shape.H**-0.5)
            else:
                expert.copy_(torch.randn(expert.shape, device=place.device) * 16)
    layer.routed_experts.process_weights_after_loading()
    return layer


@dataclass(frozen=True)
class LocalExperts:
    """This rank's experts on everyone's tokens x [ranks * T, H], gathered beforehand."""

    layer: MoERunner
    place: Place
    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor

    @classmethod
    def of(
        cls, layer: MoERunner, place: Place, x: torch.Tensor, logits: torch.Tensor
    ) -> LocalExperts:
        weights, ids = layer.router.select_experts(x, logits)
        everyones = []
        for mine in (x, weights, ids):
            parts = [torch.empty_like(mine) for _ in range(place.ranks)]
            dist.all_gather(parts, mine.contiguous(), group=place.group)
            everyones.append(torch.cat(parts))
        return cls(layer, place, *everyones)

    @functools.cached_property
    def kernel(self) -> FusedMoEKernel:
        kernel = self.layer.routed_experts.quant_method.kernel(self.layer.routed_experts)
        assert isinstance(kernel, FusedMoEKernel)
        return FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), kernel.experts)

    def __call__(self) -> torch.Tensor:
        """This rank's part of everyone's output [ranks * T, H]."""
        experts, moe = self.layer.routed_experts, self.layer.moe_config
        return self.kernel.apply(
            *(self.x, experts.w13_weight, experts.w2_weight, self.topk_weights, self.topk_ids),
            activation=moe.activation,
            global_num_experts=moe.num_experts,
            expert_map=experts.expert_map,
        )

    def error_of(self, output: torch.Tensor) -> float:
        """Relative, of this rank's output [T, H], against the sum of all ranks' parts."""
        total = self().float()
        dist.all_reduce(total, group=self.place.group)
        T = output.shape[0]
        mine = total[self.place.group.rank() * T :][:T]
        return float((output.float() - mine).norm() / mine.norm())

    def limit_us(self, shape: LayerShape, T: int, rates: dict[str, float], fmt: str) -> float:
        """What this rank's experts cannot go below, on the rank with most to do."""
        experts = self.layer.routed_experts
        mine = self.topk_ids[self.topk_ids >= 0].long()
        if experts.expert_map is not None:
            mine = mine[experts.expert_map[mine] >= 0]
        weights = sum(one.nbytes for one in experts.parameters())
        moved = weights * mine.unique().numel() / self.layer.moe_config.num_local_experts
        rate = rates["fp8_tflops" if fmt == "fp8_block" else "bf16_tflops"]
        flops = shape.pair_flops * mine.numel()
        alone = least_us(moved + 4 * T * shape.H, flops, rates["read_gbs"], rate)
        return self.place.slowest([alone]).us


def ways_of(place: Place, with_peers: bool, wanted: list[str] | None) -> list[str]:
    """What can be measured there, as the head of this file names it."""
    if place.ranks == 1:
        return ["no_ep"]
    found = (
        ["peer", *(f"peer+{how}" for how in PEERS if how)]
        if with_peers
        else ["all_to_all", "all_to_all+halves"]
    )
    found = [*found, "naive_dp_ep", "naive_dp_ep+halves"]
    return [name for name in found if wanted is None or name in wanted]


def make_memory(shape: LayerShape, args: argparse.Namespace, place: Place, how: str) -> PeerMemory:
    """``how`` is one of PEERS."""
    key = FP8_DYNAMIC_128 if args.format == "fp8_block" else None
    layout = peer_layout(shape, place.ranks, max(args.tokens), torch.bfloat16, key)
    if how == "pushed":
        layout = replace(layout, pushed_rows=layout.rows)
    return PeerMemory(place.group, layout, timeout_s=COMPILING_S, **PEERS[how])


def measure(
    shape: LayerShape, args: argparse.Namespace, place: Place, rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """The rows of one shape over the ranks of ``place``, as they come."""
    with_peers = place.ranks > 1 and no_peer_memory(place.group, place.device) is None
    memories: dict[str, PeerMemory] = {}
    if with_peers:
        memories[""] = make_memory(shape, args, place, "")
    gbs = wire_gbs(place, memories.get("")) if place.ranks > 1 else None
    experts_us: dict[int, float] = {}
    for name in ways_of(place, with_peers, args.ways):
        way, _, how = name.partition("+")
        if way == "peer" and how not in memories:
            memories[how] = make_memory(shape, args, place, how)
        layer = make_layer(shape, args.format, place, name, memories.get(how), args.experts)
        for T in args.tokens:
            yield from measure_way(shape, args, place, rates, layer, name, T, gbs, experts_us)
        del layer
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    for memory in memories.values():
        memory.check()
        memory.close()


def measure_way(
    shape: LayerShape,
    args: argparse.Namespace,
    place: Place,
    rates: dict[str, float],
    layer: MoERunner,
    name: str,
    T: int,
    gbs: float | None,
    experts_us: dict[int, float],
) -> Iterator[dict[str, Any]]:
    """One way with T tokens per rank; before the first of them, the experts alone."""
    x = torch.randn(T, shape.H, device=place.device).bfloat16()
    seed = 100 * T + place.group.rank()
    logits = routing_logits("uniform", T, shape.num_experts, shape.k, seed, place.device)
    rounds = max(1, 2048 // max(T, 128)) if place.device.type == "cuda" else 1
    alone = LocalExperts.of(layer, place, x, logits)
    ids = layer.router.select_experts(x, logits)[1]
    wire = 0.0 if gbs is None else wire_limit_us(ids, shape, args.format, place, gbs)
    facts = facts_of(layer, shape, args.format, place, T) | {
        "limit_us": round(alone.limit_us(shape, T, rates, args.format), 2),
        **{"p2p_gbs": gbs and round(gbs, 2), "wire_limit_us": round(wire, 2)},
    }
    if T not in experts_us:
        times = time_call(alone, place, rounds, True)
        experts_us[T] = times.us
        kind = explain(layer).chosen
        yield row_of("local_experts", "experts", facts, times, shape, None) | {
            "experts": name_of(kind)
        }
    way = name.partition("+")[0]
    known = {} if way == "no_ep" else {"tokens_per_rank": [T] * place.ranks}
    forward = functools.partial(layer, x, logits, **known)
    error = alone.error_of(forward())
    times = time_call(forward, place, rounds, way in CAPTURED)
    row = row_of(f"fusedmoe:{name}", "layer", facts, times, shape, error)
    yield row | against(experts_us[T], times.us, wire, T)


def facts_of(layer: MoERunner, shape: LayerShape, fmt: str, place: Place, T: int) -> dict[str, Any]:
    sizes = {"shape": shape.name, "E": layer.moe_config.num_local_experts, "k": shape.k}
    sizes |= {"H": shape.H, "I": shape.I, "T": T, "format": fmt, "routing": "uniform"}
    return sizes | {"ranks": place.ranks, "tokens_per_rank": T}


def row_of(
    impl: str,
    scope: str,
    facts: dict[str, Any],
    times: Percentiles,
    shape: LayerShape,
    error: float | None,
) -> dict[str, Any]:
    flops = shape.pair_flops * facts["T"] * shape.k  # of the average rank
    return (
        {"impl": impl, "scope": scope}
        | facts
        | times.rounded()
        | {
            "fraction_of_limit": round(facts["limit_us"] / times.us, 4),
            "tflops": round(flops / times.us / 1e6, 2),
            "error": error,
        }
    )


def against(experts: float, us: float, wire: float, T: int) -> dict[str, Any]:
    """A layer's time beside what its parts would take."""
    limit = OVERLAP_FACTOR * max(experts, wire) + OVERLAP_SLACK_US
    asked = T >= OVERLAP_FROM and wire > 0
    return {
        "experts_us": round(experts, 2),
        "exposed_us": round(us - experts, 2),
        "exposed_fraction": round((us - experts) / us, 4),
        "overlap_limit_us": round(limit, 2),
        "target_met": us <= limit if asked else None,
    }


def add_scaling(rows: list[dict[str, Any]]) -> None:
    """Against one rank with all experts and as many tokens as each rank has here."""
    alone = {
        (row["shape"], row["T"]): row["us"]
        for row in rows
        if row["ranks"] == 1 and row["scope"] == "layer"
    }
    for row in rows:
        one = alone.get((row["shape"], row["T"]))
        if row["scope"] == "layer" and one is not None:
            row["scaling"] = round(one / row["us"], 3)


def rates_of(device: torch.device, fmt: str) -> dict[str, float]:
    """What one GPU can do by itself, all of them being asked at once."""
    found = measure_ceilings(device, (torch.bfloat16,))
    if fmt == "fp8_block" and device.type == "cuda":
        found["fp8_tflops"] = eight_bit_rates()["fp8_tflops"]
    elif fmt == "fp8_block":
        found["fp8_tflops"] = found["bf16_tflops"]
    return found


def publish(report: BenchReport, row: dict[str, Any], out: str | None) -> None:
    """Print what was measured last, and write all of it so far: who is stopped leaves something."""
    report.rows.append(row)
    report.header["p2p_gbs"] = row["p2p_gbs"]
    add_scaling(report.rows)
    print(row, flush=True)
    if out:
        report.write(out)


def join(record: dict[str, Any], other: dict[str, Any]) -> None:
    """Put the rows of ``other`` that ``record`` lacks into it, and say of which run they are."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("shape", "format", "ranks", "T", "impl"))

    known = {key(row) for row in record["rows"]}
    runs = record.setdefault("joined", [])
    runs.append({name: other[name] for name in ("device", "commit", "command", "date")})
    new = [row | {"joined": len(runs)} for row in other["rows"] if key(row) not in known]
    record["rows"] += new
    add_scaling(record["rows"])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["deepseek-v3", "qwen3-235b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 128, 1024, 8192])
    parser.add_argument("--format", choices=("bf16", "fp8_block"), default="bf16")
    parser.add_argument("--ranks", nargs="+", type=int, help="1, 2, 4, ... up to all")
    parser.add_argument("--ways", nargs="+", help="as rows name them, without fusedmoe:")
    parser.add_argument("--experts", help="an implementation by name")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy layer, to try the script")
    parser.add_argument("--out")
    parser.add_argument(
        "--join", nargs="+", metavar="FILE", help="measure nothing: --out takes in what it lacks"
    )
    args = parser.parse_args()
    if args.join:
        record = json.loads(Path(args.out).read_text())
        for other in args.join:
            join(record, json.loads(Path(other).read_text()))
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
        return
    shapes = [TINY] if args.tiny else [SHAPES[name] for name in args.shapes]
    with launched_ranks(torch.device(args.device)) as here:
        counts = args.ranks or [1 << n for n in range(here.size.bit_length())]
        groups = {n: dist.new_group(list(range(n))) for n in counts if n <= here.size}
        rates = rates_of(here.device, args.format)
        report = BenchReport(make_header(here.device, rates))
        for shape in shapes:
            for n, group in groups.items():
                if here.rank < n:
                    place = Place(group, here.device, args.repeats)
                    for row in measure(shape, args, place, rates):
                        publish(report, row, args.out if here.rank == 0 else None)
                dist.barrier(here.group)


if __name__ == "__main__":
    main()
