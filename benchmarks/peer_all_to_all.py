"""Dispatch and combine between the GPUs of one host, in a CUDA graph, against the wire's limit.

    torchrun --nproc-per-node 4 benchmarks/peer_all_to_all.py \
        [--sweep] [--out benchmarks/results/h200-x4/all_to_all.json]

H 7168, k 8, E 256 (linear placement), uniform routing, fp8 rows with a scale per 128 columns one
way, bf16 the other. Times are per dispatch and combine together, the slowest rank's median; the
limit is the bytes over the wire, one copy per (token, rank), at the measured rate of a peer-to-peer
copy. The peer in the same run is NCCL's all-gather and reduce-scatter of the same rows.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from wire_targets import reached

from fusedmoe.bench.report import BenchReport, make_header
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.kernels.peer_all_to_all import (
    combine,
    combine_reference,
    dispatch,
    dispatch_reference,
)
from fusedmoe.kernels.peer_layout import PeerLayout
from fusedmoe.quantization.keys import FP8_DYNAMIC_128
from fusedmoe.runner.capture import record_graph
from fusedmoe.tuning.peer_tiles import PeerTiles, peer_tiles

H, K, E = 7168, 8, 256
ROUNDS = 20
SWEPT = [PeerTiles(n, *one) for n in (132, 264) for one in ((1024, 8), (512, 4), (512, 8))]
SWEPT_UP_TO = 256  # tokens
WARM_UPS = 10


def peer_to_peer_gbs(memory: PeerMemory) -> float:
    """GB/s of a copy of a peer's buffer, all ranks copying at once."""
    world, rank = memory.layout.world, memory.view.rank
    size = min(memory.layout.outputs_at, 1 << 28)
    theirs = memory._handle.get_buffer((rank + 1) % world, (size,), torch.uint8, 0)
    here = torch.empty_like(theirs)
    return size / time_graph(lambda: here.copy_(theirs), 1) / 1e3


def time_graph(work: Callable[[], object], rounds: int, repeats: int = 30) -> float:
    """Microseconds of one ``work``, the median over replays of the slowest rank."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    dist.barrier()
    graph, _ = record_graph(lambda: [work() for _ in range(rounds)] and None, stream)
    for _ in range(WARM_UPS):
        graph.replay()
    samples = []
    for _ in range(repeats):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / rounds)
    slowest = torch.tensor([statistics.median(samples)], device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def check(memory: PeerMemory, x, ids, weights, owners, rows: int, tiles: PeerTiles) -> None:  # type: ignore[no-untyped-def]
    """Raise where what arrives is not what the reference says; the relative error of the sums."""
    layout, rank, world = memory.layout, memory.view.rank, memory.layout.world
    everyones = [[torch.empty_like(t) for _ in range(world)] for t in (x, ids, weights)]
    for parts, mine in zip(everyones, (x, ids, weights), strict=True):
        dist.all_gather(parts, mine)
    all_x, all_ids, all_weights = everyones
    timeout_us = memory.timeout_us
    dispatch(x, ids, weights, owners, memory.view, rows, timeout_us=timeout_us, tiles=tiles)
    got = memory.view.received(rows)
    want = dispatch_reference(all_x, all_ids, all_weights, owners, layout, rows, rank)
    used = want.topk_ids >= 0
    assert torch.equal(got.topk_ids, want.topk_ids)
    assert torch.equal(got.topk_weights[used], want.topk_weights[used])
    sent = used.any(dim=1)
    assert got.scales is not None
    assert want.scales is not None
    for found, wanted in (got.hidden_states, want.hidden_states), (got.scales, want.scales):
        # A number between two of fp8's may go to either.
        torch.testing.assert_close(found[sent].float(), wanted[sent].float(), rtol=0.13, atol=1e-2)
    torch.manual_seed(rank)
    got.outputs.copy_(torch.randn_like(got.outputs, dtype=torch.float32))
    all_outputs = [torch.empty_like(got.outputs) for _ in range(world)]
    dist.all_gather(all_outputs, got.outputs)
    out = torch.full_like(x, float("nan"))
    combine(out, ids, owners, memory.view, rows, timeout_us=timeout_us, tiles=tiles)
    assert torch.equal(out, combine_reference(all_outputs, ids, owners, layout, rows, rank))
    memory.check()


def nccl_round(x: torch.Tensor, layout: PeerLayout, out: torch.Tensor) -> Callable[[], None]:
    """All-gather of rows as bytes (fp8 and scales) and reduce-scatter of bf16 sums."""
    world, T = layout.world, x.shape[0]
    width = H * layout.row_dtype.itemsize + layout.groups * 4 + K * 8
    mine = torch.zeros(T, width, dtype=torch.uint8, device="cuda")
    gathered = mine.new_empty(world * T, width)
    parts = torch.zeros(world * T, H, dtype=out.dtype, device="cuda")

    def run() -> None:
        dist.all_gather_into_tensor(gathered, mine)
        dist.reduce_scatter_tensor(out, parts)

    return run


def measure(memory: PeerMemory, T: int, gbs: float, choices: list[PeerTiles]) -> dict[str, object]:
    """A row of the report: the first of ``choices``, the others as ``all_us`` alone."""
    layout, world, rank = memory.layout, memory.layout.world, memory.view.rank
    torch.manual_seed(100 * T + rank)
    x = torch.randn(T, H, device="cuda").bfloat16()
    ids = torch.rand(T, E, device="cuda").topk(K).indices.int()
    weights = torch.rand(T, K, device="cuda")
    owners = (torch.arange(E, device="cuda") // (E // world)).int()
    check(memory, x, ids, weights, owners, T, choices[0])
    copies = torch.stack([(owners[ids.long()] == r).any(1) for r in range(world) if r != rank])
    row_bytes = H * layout.row_dtype.itemsize + layout.groups * 4 + K * 8 + H * 2
    wire = copies.sum() * row_bytes
    dist.all_reduce(wire, dist.ReduceOp.MAX)
    limit = wire.item() / gbs / 1e3
    out = torch.empty_like(x)
    view, timeout_us = memory.view, memory.timeout_us
    found = {}
    for tiles in choices:
        both = functools.partial(run_both, x, ids, weights, owners, view, out, tiles, timeout_us)
        found[tiles] = time_graph(both, ROUNDS)
    own = choices[0]
    nccl = time_graph(nccl_round(x, layout, out), ROUNDS)
    memory.check()
    return {
        "impl": "fusedmoe:peer",
        **{"shape": "deepseek-v3", "E": E // world, "k": K, "H": H, "T": T, "ranks": world},
        **{"tokens_per_rank": T, "format": "fp8 out, bf16 back", "routing": "uniform"},
        **{"us": round(found[own], 2), "tiles": own._asdict(), "wire_limit_us": round(limit, 2)},
        "fraction_of_limit": round(limit / found[own], 4),
        "all_us": {"-".join(map(str, one)): round(us, 2) for one, us in found.items()},
        "nccl_us": round(nccl, 2),
        "speedup_over_nccl": round(nccl / found[own], 2),
        "target_met": reached(world, T, found[own], limit, nccl),
    }


def run_both(x, ids, weights, owners, view, out, tiles, timeout_us) -> None:  # type: ignore[no-untyped-def]
    rows = x.shape[0]
    dispatch(x, ids, weights, owners, view, rows, timeout_us=timeout_us, tiles=tiles)
    combine(out, ids, owners, view, rows, timeout_us=timeout_us, tiles=tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024, 4096])
    parser.add_argument("--sweep", action="store_true", help="other tiles too, of few tokens")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    world = dist.get_world_size()
    layout = PeerLayout(world, max(args.tokens), H, K, torch.bfloat16, FP8_DYNAMIC_128)
    everyone = dist.group.WORLD
    assert everyone is not None
    memory = PeerMemory(everyone, layout)
    gbs = peer_to_peer_gbs(memory)
    device = torch.device("cuda", torch.cuda.current_device())
    report = BenchReport(make_header(device, {"p2p_gbs": round(gbs, 1)}))
    for T in args.tokens:
        swept = args.sweep and T <= SWEPT_UP_TO
        own = peer_tiles(T, H)
        others = [tiles for tiles in SWEPT if swept and tiles != own]
        row = measure(memory, T, gbs, [own, *others])
        report.rows.append(row)
        if dist.get_rank() == 0:
            print(row, flush=True)
    if dist.get_rank() == 0 and args.out:
        report.write(args.out)
    memory.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
