"""Where a compiled decode step's time goes: what `generate` with a static cache does, taken apart.

A model of Qwen3-30B's sizes with few layers, batch 1. For each implementation: ms a step of
`generate`, of the compiled call alone (host: until it returns; whole: until the GPU is done), what
the host's parts of it take, and the GPU's kernels.

    python benchmarks/compiled_step.py --layers 8 --kernels 12

The first compiled call of each `generate` records a CUDA graph, since the cache is a new one.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import time
from collections.abc import Callable
from typing import Any

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


def compiled_calls(model: Any, run: Callable[[], Any]) -> list[tuple[float, float]]:
    """(host, whole) ms of each compiled call of ``run()``."""
    inner, calls = model._compiled_call, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = inner(*args, **kwargs)
        host = time.perf_counter()
        torch.cuda.synchronize()
        calls.append((1e3 * (host - start), 1e3 * (time.perf_counter() - start)))
        return output

    model._compiled_call = watched
    run()
    model._compiled_call = inner
    return calls


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
    for name, spans in parts.items():
        print(f"  {statistics.median(us for _, us in spans[-4:]):8.0f} us  {name}")
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

        warm_up = timed(run)
        step = statistics.median(timed(run) for _ in range(3)) / TOKENS
        first, *calls = compiled_calls(model, run)
        host, whole = (statistics.median(call[i] for call in calls) for i in (0, 1))
        print(
            f"{implementation}, {args.layers} layers: {step:.3f} ms a step; compiled call "
            f"{host:.3f} ms on the host, {whole:.3f} whole, the first {first[1]:.1f}; warm-up "
            f"{1e-3 * warm_up:.0f} s"
        )
        print_profile(run, args.kernels)


if __name__ == "__main__":
    main()
