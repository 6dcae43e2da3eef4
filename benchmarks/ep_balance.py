"""Skewed load on the GPUs of one host, before, while and after experts move; graphs all along.

    torchrun --nproc-per-node 4 benchmarks/ep_balance.py \
        [--shape deepseek-v3] [--tokens 4096] [--out benchmarks/results/h200-x4/balance.json]

``--layers`` layers in bf16 whose 256 experts are as popular as a power law (exponent 1.2) says,
each in an order of its own (seed: the layer's number), with copies of the busiest on
``--redundant`` more slots. The forward of all of them is captured once. Phases:

    before   experts in order
    moving   steps of the balancer, which plans, or puts a layer in place and sends the next, and a
             replay behind each; ``us``: of both, ``error``: the worst, ``beside_messages``: replays
             that were launched while experts were on their way from or to this rank
    after    the new placement, on as many later tokens (``planned_for``: on those it was made for)

``imbalance``: maximal over mean picks of a rank, summed over layers, as counted on the GPUs.
``error``: relative (Frobenius), against the output before, of the same tokens. A time is that of
the slowest rank.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ep_wire import Place, time_call

from fusedmoe import FusedMoE, MoEOptions, ParallelGroups
from fusedmoe.bench.over_ranks import COMPILING_S, no_peer_memory, peer_layout
from fusedmoe.bench.report import BenchReport, Percentiles, make_header
from fusedmoe.bench.shapes import SHAPES, LayerShape
from fusedmoe.cli.ranks import launched_ranks
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.eplb.balancer import EPLBConfig, ExpertBalancer
from fusedmoe.eplb.executor import expert_bytes
from fusedmoe.eplb.maps import imbalance
from fusedmoe.runner.capture import record_graph
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.testing.routing import routing_logits

TINY = LayerShape("tiny", 16, 2, 64, 32)
ROUTING = "power_law_1.2"
MOST_STEPS = 64


def make_layer(
    shape: LayerShape, number: int, redundant: int, place: Place, memory: PeerMemory | None
) -> MoERunner:
    """Every copy of an expert has the same random weights."""
    layer = FusedMoE(
        *(shape.num_experts, shape.k, shape.H, shape.I, torch.bfloat16),
        parallel=ParallelGroups(
            dp=place.group, ep=place.group, enable_expert_parallel=True, peers=memory
        ),
        options=MoEOptions(prepare_finalize="naive_dp_ep" if memory is None else "peer"),
        enable_eplb=True,
        num_redundant_experts=redundant,
        device=place.device,
    )
    generator = torch.Generator(place.device)
    slots = layer.expert_local_to_global
    assert slots is not None
    for parameter in layer.routed_experts.parameters():
        for slot, weight in zip(slots.tolist(), parameter, strict=True):
            generator.manual_seed(number * shape.num_experts + slot % shape.num_experts)
            weight.normal_(std=shape.H**-0.5, generator=generator)
    layer.routed_experts.process_weights_after_loading()
    return layer


@dataclass
class Model:
    """Layers that run on fixed tokens x [T, H], with logits [L, T, E] of their own."""

    layers: list[MoERunner]
    x: torch.Tensor
    logits: torch.Tensor
    place: Place
    outputs: list[torch.Tensor] | None = None
    graph: Any = None

    def forward(self) -> list[torch.Tensor]:
        counts = [self.x.shape[0]] * self.place.ranks
        return [
            layer(self.x, logits, tokens_per_rank=counts)
            for layer, logits in zip(self.layers, self.logits, strict=True)
        ]

    def replay(self) -> None:
        if self.place.device.type != "cuda":
            self.outputs = self.forward()
            return
        if self.graph is None:
            self.forward()
            self.graph, self.outputs = record_graph(self.forward, torch.cuda.Stream())
        self.graph.replay()

    def error(self, wanted: list[torch.Tensor]) -> float:
        """The worst layer's, of any rank."""
        assert self.outputs is not None
        errors = [
            float((found.float() - one.float()).norm() / one.float().norm())
            for found, one in zip(self.outputs, wanted, strict=True)
        ]
        return self.place.slowest([1e6 * max(errors)]).us / 1e6


def counted_imbalance(model: Model, balancer: ExpertBalancer) -> float:
    """Of one replay."""
    balancer.should_record.fill_(1)
    balancer.expert_load.zero_()
    model.replay()
    load = balancer.expert_load.clone()
    balancer.expert_load.zero_()
    dist.all_reduce(load, group=model.place.group)
    return imbalance(load.view(len(model.layers), model.place.ranks, -1).sum(-1).cpu())


def measure(shape: LayerShape, args: argparse.Namespace, place: Place) -> list[dict[str, Any]]:
    T, E, rank, L = args.tokens, shape.num_experts, place.group.rank(), args.layers
    memory = None
    if no_peer_memory(place.group, place.device) is None:
        layout = peer_layout(shape, place.ranks, T, torch.bfloat16)
        memory = PeerMemory(place.group, layout, timeout_s=COMPILING_S)
    drawn = [
        routing_logits(ROUTING, 2 * T * place.ranks, E, shape.k, seed).split(T) for seed in range(L)
    ]
    planned_for, later = (
        torch.stack([one[part * place.ranks + rank] for one in drawn]).to(place.device)
        for part in (0, 1)
    )
    layers = [make_layer(shape, number, args.redundant, place, memory) for number in range(L)]
    x = torch.randn(T, shape.H, device=place.device).bfloat16()
    model = Model(layers, x, planned_for.clone(), place)
    config = EPLBConfig(window_size=4, step_interval=4, planning_steps=args.planning_steps)
    beside = dist.new_group(dist.get_process_group_ranks(place.group))
    balancer = ExpertBalancer(layers, place.group, config, transfer_group=beside)
    model.replay()
    assert model.outputs is not None
    wanted = [one.clone() for one in model.outputs]
    sizes = {"shape": shape.name, "E": E, "k": shape.k, "H": shape.H, "I": shape.I, "T": T}
    sizes |= {"ranks": place.ranks, "redundant_experts": args.redundant, "layers": L}
    sizes |= {"format": "bf16", "routing": ROUTING}

    def row(phase: str, times: Percentiles, **found: Any) -> dict[str, Any]:
        return {"impl": "fusedmoe", "phase": phase} | sizes | times.rounded(1) | found

    rows = [
        row(
            "before",
            time_call(model.replay, place, 1, False),
            imbalance=round(counted_imbalance(model, balancer), 4),
        )
    ]
    times, found = move(model, balancer, wanted)
    size = expert_bytes(layers[0].routed_experts.get_expert_weights())
    rows.append(row("moving", times, **found, bytes_per_expert=size))
    on_planned = counted_imbalance(model, balancer)
    model.replay()
    error = model.error(wanted)
    model.logits.copy_(later)
    rows.append(
        row(
            "after",
            time_call(model.replay, place, 1, False),
            imbalance=round(counted_imbalance(model, balancer), 4),
            planned_for=round(on_planned, 4),
            error=error,
        )
    )
    if memory is not None:
        memory.check()
        memory.close()
    return rows


def move(
    model: Model, balancer: ExpertBalancer, wanted: list[torch.Tensor]
) -> tuple[Percentiles, dict[str, Any]]:
    """Steps until all experts are in place; every output on the way is looked at."""
    start = balancer.physical_to_logical.clone()
    samples: list[float] = []
    errors: list[float] = []
    balancer.should_record.fill_(1)
    model.replay()
    beside = [0]

    def step() -> None:
        balancer.step()
        beside[0] += balancer.mover.is_sending
        model.replay()

    while len(samples) < MOST_STEPS:
        samples.append(time_call(step, model.place, 1, False, repeats=1, warm_up=False).us)
        errors.append(model.error(wanted))
        if not balancer.is_rearranging and not torch.equal(balancer.physical_to_logical, start):
            break
    moved = int((balancer.physical_to_logical != start).sum())
    return Percentiles.of(samples), {
        "steps": len(samples),
        "beside_messages": beside[0],
        "slots_changed": moved,
        "error": max(errors),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="deepseek-v3")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--redundant", type=int, default=24)
    parser.add_argument("--planning-steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy layer, to try the script")
    parser.add_argument("--out")
    args = parser.parse_args()
    with launched_ranks(torch.device(args.device)) as here:
        place = Place(here.group, here.device, args.repeats)
        report = BenchReport(make_header(here.device, {}))
        report.rows += measure(TINY if args.tiny else SHAPES[args.shape], args, place)
        for row in report.rows:
            print(row)
        if args.out and here.rank == 0:
            report.write(args.out)


if __name__ == "__main__":
    main()
