"""Tiles of the 8-bit decode on Hopper against each other, from router logits, in turns.

    PYTHONPATH=src python benchmarks/w8a8_variants.py [--shapes qwen3-30b] [--formats fp8_block]
        [--tokens 1 8 64] [--routing balanced] [--variants chosen one_ring ...] [--timeline]

Prints microseconds, the share of the limit (``quantized_layer``) and whether the bits are those of
the tiles that ``tuning.w8a8_tiles`` chooses. ``--timeline``: when each launch of a layer begins and
ends, from a profile of the replays.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from functools import partial

import torch
from quantized_layer import (
    DEVICE,
    SITUATIONS,
    build,
    eight_bit_rates,
    limit_us,
    situations,
    weights_of,
)
from quantized_targets import ROWS, SHAPES
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]

from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.replays import Replays, record, time_in_turns
from fusedmoe.experts.hopper_quantized import HopperQuantizedExperts
from fusedmoe.tuning.w8a8_tiles import StreamTile, StreamTiles

REPEATS = 30
# rows, valid, depth, span of 8 slots, stages, programs
VARIANTS: dict[str, tuple[int, int, int, int, int, int]] = {
    "two_rings": (128, 64, 2, 8, 3, 2),
    "one_ring": (256, 128, 2, 8, 3, 1),
    "short_stages": (256, 128, 1, 8, 6, 1),
}


def tiles(name: str, slots: int) -> StreamTiles | None:
    """Both GEMMs with one tile, or ``first+second``; None: chosen."""
    if name == "chosen":
        return None
    found = []
    for part in (name.split("+") * 2)[:2]:
        rows, valid, depth, span, stages, programs = VARIANTS[part]
        span = max(depth, span * 8 // slots)
        found.append(StreamTile(rows, valid, slots, depth, span, stages, programs))
    return StreamTiles(*found)


def timeline(replays: Replays) -> list[str]:
    """One line per launch of a layer, microseconds from the beginning of its routing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for graph in replays.graphs:
            graph()
        torch.cuda.synchronize()
    launches = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
    )
    layers: list[list[tuple[float, float, str]]] = []
    for launch in launches:
        if "rout" in launch[2] or not layers:
            layers.append([])
        layers[-1].append(launch)
    count = Counter(map(len, layers)).most_common(1)[0][0]
    whole = [layer for layer in layers if len(layer) == count]
    lines = []
    for i in range(count):
        begin = statistics.median(layer[i][0] - layer[0][0] for layer in whole)
        end = statistics.median(layer[i][1] - layer[0][0] for layer in whole)
        lines.append(f"    {whole[0][i][2][:40]:40} {begin:8.1f} to {end:8.1f}")
    return lines


def measure(shape_name: str, fmt: str, args: argparse.Namespace, peak: dict[str, float]) -> None:
    shape = SHAPES[shape_name]
    layers = [build(shape, fmt, "hopper_quantized") for _ in range(SITUATIONS)]
    for T in args.tokens:
        x = torch.randn(T, shape.H, device=DEVICE, dtype=torch.bfloat16)
        picked = situations(shape, args.routing, T, SITUATIONS)
        active = statistics.mean(one.topk_ids.unique().numel() for one in picked)
        limit = limit_us(shape, weights_of(layers[0]), ROWS[fmt], active, T, peak)
        mean = T * shape.k / shape.num_experts
        slots = 8 if mean <= 6 else 16 if mean <= 12 else 32
        recorded, outputs = {}, {}
        for name in args.variants:
            HopperQuantizedExperts.stream_tiles = tiles(name, slots)
            calls = [partial(layers[i], x, one.logits) for i, one in enumerate(picked)]
            try:
                recorded[name] = record(calls, limit, REPEATS)
            except Exception as error:
                print(f"{name}: {str(error)[:120]}")
                continue
            outputs[name] = recorded[name].graphs[0]().clone()
        HopperQuantizedExperts.stream_tiles = None
        samples = time_in_turns(recorded)
        for name, replays in recorded.items():
            us = statistics.median(samples[name])
            same = outputs[name].equal(outputs[next(iter(outputs))])
            print(
                f"{shape_name:16} {fmt:12} T={T:4} {name:20} {us:8.1f} us "
                f"{100 * limit / us:5.1f} %  same bits {same}",
                flush=True,
            )
            if args.timeline:
                print("\n".join(timeline(replays)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b"])
    parser.add_argument("--formats", nargs="+", default=["fp8_block"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 64, 128])
    parser.add_argument("--routing", default="balanced")
    parser.add_argument("--variants", nargs="+", default=["chosen", *VARIANTS])
    parser.add_argument("--timeline", action="store_true")
    args = parser.parse_args()
    peak = measure_ceilings(DEVICE, ()) | eight_bit_rates()
    for shape in args.shapes:
        for fmt in args.formats:
            measure(shape, fmt, args, peak)


if __name__ == "__main__":
    main()
