"""One layer over the ranks of a group: the whole of it, and its dispatch and its combine alone.

Every way to move tokens that can run there is measured on the same weights and tokens, launch by
launch (no graph). A time is the slowest rank's, because that is what all of them wait for.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fusedmoe.bench.report import BenchReport, Percentiles, make_header
from fusedmoe.bench.shapes import LayerShape
from fusedmoe.config import MoEOptions, ParallelGroups
from fusedmoe.distributed.collectives import gather_vectors
from fusedmoe.distributed.groups import TokenRanks
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.kernels.peer_layout import PeerLayout
from fusedmoe.layer import FusedMoE
from fusedmoe.modular_kernel import FusedMoEKernel, FusedMoEPrepareAndFinalizeModular, PrepareResult
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.testing.routing import routing_logits
from fusedmoe.testing.tolerances import format_name
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WAYS = ("naive_dp_ep", "all_to_all", "peer")
_WARM_UP = 3
COMPILING_S = 60.0  # ranks compile their kernels at their own pace


@torch.inference_mode()
def run_ranks_bench(
    shape: LayerShape,
    tokens: Sequence[int],
    dtype: torch.dtype,
    group: ProcessGroup,
    device: torch.device,
    routing: str = "uniform",
    repeats: int = 20,
    ways: Sequence[str] = WAYS,
) -> BenchReport:
    """``shape`` with all its experts spread over ``group``; ``tokens`` per rank.

    Rows of scope ``layer`` (from router logits), ``dispatch`` and ``combine``; all ranks call it
    and get the same report. ``peer`` is left out, with a note, where ranks cannot address each
    other's memory. Raises ValueError for fewer than two ranks.
    """
    if group.size() < 2:
        raise ValueError(f"expert parallelism needs two ranks, this group has {group.size()}")
    ranks = TokenRanks((group,))
    report = BenchReport(make_header(device, {}))
    for way in ways:
        memory = None
        if way == "peer":
            reason = no_peer_memory(group, device)
            if reason is not None:
                report.notes.append(f"peer: {reason}")
                continue
            layout = peer_layout(shape, group.size(), max(tokens), dtype)
            memory = PeerMemory(group, layout, timeout_s=COMPILING_S)
        layer = _layer(shape, dtype, group, device, way, memory)
        for T in tokens:
            x = torch.randn(T, shape.H, device=device).to(dtype)
            seed = group.rank()
            logits = routing_logits(routing, T, shape.num_experts, shape.k, seed, device)
            for steps in _steps(layer, x, logits, [T] * group.size()):
                for scope, samples in _samples(steps, repeats, group, device).items():
                    row = _row(shape, layer, dtype, routing, T, group.size())
                    times = Percentiles.of(_slowest(samples, ranks))
                    name = {"impl": f"fusedmoe:{way}", "scope": scope}
                    report.rows.append(name | row | times.rounded())
        del layer
        if memory is not None:
            memory.close()
    return report


def no_peer_memory(group: ProcessGroup, device: torch.device) -> str | None:
    """Why the ranks of ``group`` cannot address each other's memory; None where they can.

    A collective call.
    """
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7], "little")
    hosts = gather_vectors([host], TokenRanks((group,)))
    if device.type != "cuda":
        return f"needs GPUs, the ranks run on {device.type}"
    if any(one != hosts[0] for one in hosts):
        return "the ranks are on several hosts"
    if group.size() & (group.size() - 1):
        return f"needs a power of two ranks, there are {group.size()}"
    return None


def peer_layout(
    shape: LayerShape, ranks: int, tokens: int, dtype: torch.dtype, key: QuantKey | None = None
) -> PeerLayout:
    """Buffers for ``tokens`` of each rank, which travel as ``key`` says or as they are."""
    return PeerLayout(ranks, max(tokens, 1), shape.H, shape.k, dtype, key)


def _layer(
    shape: LayerShape,
    dtype: torch.dtype,
    group: ProcessGroup,
    device: torch.device,
    way: str,
    memory: PeerMemory | None,
) -> MoERunner:
    layer = FusedMoE(
        shape.num_experts,
        shape.k,
        shape.H,
        shape.I,
        dtype,
        activation=shape.activation,
        has_bias=shape.bias,
        parallel=ParallelGroups(dp=group, ep=group, enable_expert_parallel=True, peers=memory),
        options=MoEOptions(prepare_finalize=way),
        device=device,
    )
    for row in layer.routed_experts.get_expert_weights():
        row.normal_(std=shape.H**-0.5)
    layer.routed_experts.process_weights_after_loading()
    return layer


Steps = dict[str, Callable[[Any], Any]]
"""By scope: what runs one after the other, each on the result of the one before."""


def _steps(
    layer: MoERunner, x: torch.Tensor, logits: torch.Tensor, counts: list[int]
) -> Iterator[Steps]:
    yield {"layer": lambda _: layer(x, logits, tokens_per_rank=counts)}
    experts = layer.routed_experts
    kernel = experts.quant_method.kernel(experts)
    assert isinstance(kernel, FusedMoEKernel)
    weights, ids = layer.router.select_experts(x, logits)
    output = torch.empty_like(x)

    def dispatch(_: None) -> tuple[FusedMoEPrepareAndFinalizeModular, PrepareResult]:
        mover = kernel.prepare_finalize.begin(counts)
        found = mover.prepare(
            *(x, weights, ids, layer.moe_config.num_experts, experts.expert_map, False),
            kernel.experts.quant_config,
            kernel.experts.expects_unquantized_inputs,
        )
        return mover, found

    def combine(sent: tuple[FusedMoEPrepareAndFinalizeModular, PrepareResult]) -> None:
        mover, found = sent
        assert found.topk_weights is not None
        assert found.topk_ids is not None
        wanted = mover.expert_output()
        sums = found.hidden_states if wanted is None else wanted
        mover.finalize(
            *(output, sums, found.topk_weights, found.topk_ids, False), TopKWeightAndReduceNoOP()
        )

    yield {"dispatch": dispatch, "combine": combine}


def _samples(
    steps: Steps, repeats: int, group: ProcessGroup, device: torch.device
) -> dict[str, list[int]]:
    """Nanoseconds of each step on this rank, every one begun by all ranks together."""
    found: dict[str, list[int]] = {scope: [] for scope in steps}
    for turn in range(_WARM_UP + repeats):
        result = None
        for scope, step in steps.items():
            dist.barrier(group)
            start = time.perf_counter_ns()
            result = step(result)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= _WARM_UP:
                found[scope].append(time.perf_counter_ns() - start)
    return found


def _slowest(samples: list[int], ranks: TokenRanks) -> list[float]:
    """Microseconds of the rank that took longest, sample by sample."""
    return [max(taken) / 1e3 for taken in zip(*gather_vectors(samples, ranks), strict=True)]


def _row(
    shape: LayerShape, layer: MoERunner, dtype: torch.dtype, routing: str, T: int, ranks: int
) -> dict[str, Any]:
    return {
        "shape": shape.name,
        "E": layer.moe_config.num_local_experts,
        "k": shape.k,
        "H": shape.H,
        "I": shape.I,
        "T": T,
        "ranks": ranks,
        "tokens_per_rank": T,
        "format": format_name(dtype),
        "routing": routing,
    }
