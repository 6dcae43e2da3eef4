"""Where a compiled decode step's time goes: what `generate` with a static cache does, taken apart.

A model of Qwen3-30B's sizes with few layers, batch 1. For each implementation: ms of `generate`,
what passes before its first compiled call (the prompt, mostly, which is not compiled), the parts of
a step, and then, profiled, the host's parts and the GPU's kernels.

    python benchmarks/compiled_step.py --layers 8 --kernels 12

A cache at new addresses makes the first step record its CUDA graph again. A profile lengthens the
graph's launch by 0.85 us for each kernel in it.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from model_generate import BASELINE, QWEN3_30B, build_model, generate, use

import fusedmoe

TOKENS = 64
HOST_PARTS = ("TorchDynamo Cache Lookup", "Pregraph bytecode", "AOTDispatcher Runtime Wrapper")


def timed(call: Callable[[], Any]) -> float:
    """ms until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


class Step(NamedTuple):
    """One compiled call: seconds of the host's clock, and events around the graph's replay."""

    called: float
    replayed: float
    launched: float
    returned: float
    on_gpu: tuple[torch.cuda.Event, torch.cuda.Event]


@contextmanager
def watched(model: Any) -> Iterator[list[Step]]:
    """The compiled calls made meanwhile; one that records a graph launches it, too."""
    inner, replay = model._compiled_call, torch.cuda.CUDAGraph.replay
    steps: list[Step] = []
    replays: list[tuple[float, float, tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    def replay_timed(graph: torch.cuda.CUDAGraph) -> None:
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        start = time.perf_counter()
        replay(graph)
        replays.append((start, time.perf_counter(), events))
        events[1].record()

    def call(*args: Any, **kwargs: Any) -> Any:
        replays.clear()
        start = time.perf_counter()
        output = inner(*args, **kwargs)
        for replayed, launched, events in replays[-1:]:
            steps.append(Step(start, replayed, launched, time.perf_counter(), events))
        return output

    graphs: Any = torch.cuda.CUDAGraph
    model._compiled_call, graphs.replay = call, replay_timed
    try:
        yield steps
    finally:
        model._compiled_call, graphs.replay = inner, replay


def print_steps(steps: Sequence[Step]) -> None:
    """Median microseconds of the parts of a step, on the host's clock and on the GPU's."""
    pairs = list(pairwise(steps))
    parts = {
        "the call until the graph's launch": [1e6 * (s.replayed - s.called) for s in steps],
        "the launch": [1e6 * (s.launched - s.replayed) for s in steps],
        "until the call returns": [1e6 * (s.returned - s.launched) for s in steps],
        "the graph, on the GPU": [1e3 * s.on_gpu[0].elapsed_time(s.on_gpu[1]) for s in steps],
        "its end until the next one": [
            1e3 * a.on_gpu[1].elapsed_time(b.on_gpu[0]) for a, b in pairs
        ],
        "from call to call": [1e6 * (b.called - a.called) for a, b in pairs],
    }
    for name, taken in parts.items():
        print(f"  {statistics.median(taken):8.0f} us  {name}")


def print_profile(run: Callable[[], Any], kernels: int) -> None:
    """The host's parts of the last step, and its GPU time by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    parts: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    on_gpu = []
    for event in profile.events():
        span = event.time_range
        if event.device_type.name == "CUDA":
            on_gpu.append((span.start, span.end, event.name))
        elif event.name.startswith((*HOST_PARTS, "cudaGraphLaunch")):
            parts[event.name].append((span.start, span.elapsed_us()))
    for name in HOST_PARTS:
        found = [us for event, spans in parts.items() if event.startswith(name) for _, us in spans]
        print(f"  {statistics.median(found[-4:]):8.0f} us  {name}")
    launched = max(start for start, _ in parts["cudaGraphLaunch"])
    step = sorted(event for event in on_gpu if event[0] >= launched)
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    for start, end, name in step:
        by_name[name[:70]].append(end - start)
    busy = sum(end - start for start, end, _ in step)
    whole = step[-1][1] - step[0][0]
    print(f"  {busy:8.0f} us  on the GPU in {len(step)} launches, first to last {whole:.0f} us")
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:kernels]:
        print(f"  {sum(times):8.1f} us  {len(times):4d} x {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--implementations", nargs="+", default=[BASELINE, "fusedmoe:accelerate"])
    parser.add_argument("--kernels", type=int, default=12, help="how many to print")
    args = parser.parse_args()
    fusedmoe.register()
    model = build_model(QWEN3_30B, args.layers, "cuda", router_gain=4.0)
    prompt = torch.randint(0, model.config.vocab_size, (1, 128), device="cuda")
    for implementation in args.implementations:
        use(model, implementation)

        def run() -> None:
            generate(model, prompt, TOKENS, "static")

        runs = [timed(run) for _ in range(8)]
        start = time.perf_counter()
        with watched(model) as steps:
            run()
        print(
            f"{implementation}, {args.layers} layers: generate of {TOKENS} tokens, ms "
            f"{', '.join(f'{ms:.1f}' for ms in runs)}; before the first compiled call "
            f"{1e3 * (steps[0].called - start):.1f}; of a step"
        )
        print_steps(steps[4:])
        print_profile(run, args.kernels)


if __name__ == "__main__":
    main()
