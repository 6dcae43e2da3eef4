"""Tiles of the streaming CUDA kernel against each other in turns, on one GPU.

    PYTHONPATH=src python benchmarks/quantized_decode.py [--cases qwen3-30b:int4_g128:1,8,64 ...]
        [--tiles "2,8,2,2,64,4,4/2,8,1,4,64,4,4" ...] [--out F.json]

A tile is tiles of 16 rows, slots, warps along the columns, warps across the rows, bytes per step,
stages, programs per multiprocessor, as ``CudaDecodeTile`` has them; two of them, one per GEMM. What
the library chooses, and neighbours of it, are always there. Experts scope: ids given, alignment
and sum included; balanced routing, graph replays, weights that change from replay to replay.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from quantized_layer import DEVICE, REPEATS, build, errors, limit_us, weights_of
from quantized_targets import SHAPES

from fusedmoe.activation import MoEActivation
from fusedmoe.bench import BenchReport, LayerShape
from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.problems import Situation, pick
from fusedmoe.bench.replays import record, time_in_turns
from fusedmoe.bench.report import BenchRow, Percentiles, make_header
from fusedmoe.experts.hopper import multiprocessors_of
from fusedmoe.kernels.hopper_quantized import decode_tiles_for, lone_slots, quantized_decode
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.testing.routing import routing_logits
from fusedmoe.tuning.cuda_tiles import CudaDecodeTile, CudaDecodeTiles

CASES = ("qwen3-30b:int4_g128:1,8,64", "gpt-oss-120b:mxfp4:1,8,32,128")
COPIES = 4


def parsed(text: str) -> CudaDecodeTiles:
    first, second = (CudaDecodeTile(*map(int, part.split(","))) for part in text.split("/"))
    return CudaDecodeTiles(first, second)


def variants(chosen: CudaDecodeTiles, asked: list[str]) -> dict[str, CudaDecodeTiles]:
    """What to time, by name."""
    found = {"chosen": chosen, **{text: parsed(text) for text in asked}}
    for name, change in (
        ("5 programs", {"per_multiprocessor": 5}),
        ("6 programs, 3 stages", {"per_multiprocessor": 6, "stages": 3}),
        ("no prefetch", {"prefetch": ""}),
        ("prefetch 256", {"prefetch": ".L2::256B"}),
    ):
        found[name] = CudaDecodeTiles(*(replace(tile, **change) for tile in chosen))
    return found


def run(
    shape: LayerShape,
    layer: MoERunner,
    x: torch.Tensor,
    one: Situation,
    scratch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    programs: int,
    tiles: CudaDecodeTiles,
) -> torch.Tensor:
    routed: Any = layer.routed_experts
    config = routed.quant_method.get_fused_moe_quant_config(routed)
    quantized_decode(
        x,
        *weights_of(layer),
        one.topk_weights,
        one.topk_ids,
        *scratch,
        activation=MoEActivation.from_str(shape.activation),
        w1_bias=config.w1_bias,
        w2_bias=config.w2_bias,
        tiles=tiles,
        programs=programs,
    )
    return scratch[0]


def measure(case: str, asked: list[str], report: BenchReport) -> None:
    """All token counts of one shape and format."""
    name, fmt, tokens = case.split(":")
    shape = SHAPES[name]
    layers = [build(shape, fmt, "triton_quantized") for _ in range(COPIES)]
    programs = multiprocessors_of(DEVICE)
    for T in map(int, tokens.split(",")):
        R, x = T * shape.k, torch.randn(T, shape.H, device=DEVICE, dtype=torch.bfloat16)
        ones: list[Situation] = [
            pick(
                routing_logits("balanced", T, shape.num_experts, shape.k, seed, DEVICE).bfloat16(),
                shape.k,
            )
            for seed in range(COPIES)
        ]
        active = sum(one.topk_ids.unique().numel() for one in ones) / COPIES
        limit = limit_us(shape, weights_of(layers[0]), None, active, T, report.header)
        scratch = (
            torch.empty_like(x),
            torch.empty(R, shape.I, device=DEVICE, dtype=torch.bfloat16),
            torch.empty(R, shape.H, device=DEVICE),
        )
        runs = [
            partial(run, shape, layer, x, one, scratch, programs)
            for layer, one in zip(layers, ones, strict=True)
        ]
        lone = lone_slots(R, shape.E, None)
        chosen = decode_tiles_for(R, *weights_of(layers[0]), lone, programs)
        recorded = {
            label: record([partial(one, tiles) for one in runs], limit, REPEATS)
            for label, tiles in variants(chosen, asked).items()
        }
        samples = time_in_turns(recorded, 0.0)
        for label, replays in recorded.items():
            timed = Percentiles.of(samples[label])
            found, _ = errors(shape, layers[0], x, ones[0], replays.graphs[0]())
            row = BenchRow(
                impl=f"fusedmoe:cuda {label}", shape=name, E=shape.E, num_experts=shape.num_experts,
                k=shape.k, H=shape.H, I=shape.I, T=T, format=fmt, routing="balanced",
                active_experts=active, pairs=float(R), scope="experts", timed="graph",
                **asdict(timed), limit_us=limit, fraction_of_limit=limit / timed.us,
                tflops=shape.flops(T) / timed.us / 1e6, error=found, runs=len(samples[label]),
                workspace_bytes=None,
            )  # fmt: skip
            report.add(row)
            print(
                f"{name:14} {fmt:10} T={T:4} {label:36} {timed.us:7.1f} us "
                f"{100 * limit / timed.us:5.1f} %  error {found:.1e}",
                flush=True,
            )
        del recorded
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--tiles", nargs="+", default=[])
    parser.add_argument("--out")
    args = parser.parse_args()
    report = BenchReport(make_header(DEVICE, measure_ceilings(DEVICE, (torch.bfloat16,))))
    for case in args.cases:
        with torch.inference_mode():
            measure(case, args.tiles, report)
        gc.collect()
        torch.cuda.empty_cache()
        if args.out:
            report.write(args.out)


if __name__ == "__main__":
    main()
