"""The streaming CUDA kernels with the tiles that the library chooses and with others, on one GPU.

    PYTHONPATH=src python benchmarks/quantized_decode.py [--cases qwen3-30b:int4_g128:8,64 ...]
        [--tiles stream:16,16,4,1/16,16,4,1 rows:1,4,3,4,1,2/1,3,4,8,1,2 ...] [--out F.json]

A tile is the fields of ``CudaStreamTile``, ``CudaRowsTile``, ``CudaWarpsTile`` or ``CudaLoneTile``;
two of them, one per GEMM. Experts scope: ids given, alignment and sum included; balanced routing,
graph replays, weights that change from call to call, all in turns. Exits with an error where an
output is further than 4e-3 from fp64's.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from quantized_layer import DEVICE, REPEATS, build, errors, limit_us, situations, weights_of
from quantized_targets import SHAPES

from fusedmoe.activation import MoEActivation
from fusedmoe.bench import BenchReport, LayerShape
from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.problems import Situation
from fusedmoe.bench.replays import record, time_in_turns
from fusedmoe.bench.report import BenchRow, Percentiles, make_header
from fusedmoe.kernels.device import multiprocessors_of
from fusedmoe.kernels.hopper_quantized import quantized_decode
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.tuning.cuda_tiles import (
    CudaDecodeTiles,
    CudaLoneTile,
    CudaRowsTile,
    CudaStreamTile,
    CudaWarpsTile,
)

CASES = (
    *("qwen3-30b:int4_g128:1,8,64", "gpt-oss-120b:mxfp4:1,8,32,128"),
    *("kimi-k2-tp8:int4_g32:1,16,64", "mixtral:int4_g128:1,8,64"),
)
COPIES, MOST_ERROR = 4, 4e-3
TILES: dict[str, Any] = {
    "lone": CudaLoneTile,
    "rows": CudaRowsTile,
    "warps": CudaWarpsTile,
    "stream": CudaStreamTile,
}


def parsed(text: str) -> CudaDecodeTiles:
    kind, _, fields = text.partition(":")
    first, second = (TILES[kind](*map(int, part.split(","))) for part in fields.split("/"))
    return CudaDecodeTiles(first, second)


def run(
    shape: LayerShape,
    layer: MoERunner,
    x: torch.Tensor,
    one: Situation,
    out: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    programs: int,
    tiles: CudaDecodeTiles | None,
) -> torch.Tensor:
    routed: Any = layer.routed_experts
    config = routed.quant_method.get_fused_moe_quant_config(routed)
    given = LayerTensors(
        x,
        *weights_of(layer),
        one.topk_weights,
        one.topk_ids,
        out,
        *scratch,
        programs,
        MoEActivation.from_str(shape.activation),
        w1_bias=config.w1_bias,
        w2_bias=config.w2_bias,
    )
    quantized_decode(given, tiles=tiles)
    return out


def measure(case: str, asked: list[str], report: BenchReport) -> bool:
    """All token counts of one shape and format; whether every output is near enough."""
    name, fmt, tokens = case.split(":")
    shape = SHAPES[name]
    layers = [build(shape, fmt, "triton_quantized") for _ in range(COPIES)]
    programs, near = multiprocessors_of(DEVICE), True
    for T in map(int, tokens.split(",")):
        R, x = T * shape.k, torch.randn(T, shape.H, device=DEVICE, dtype=torch.bfloat16)
        ones = situations(shape, "balanced", T, COPIES)
        active = sum(one.topk_ids.unique().numel() for one in ones) / COPIES
        limit = limit_us(shape, weights_of(layers[0]), None, active, T, report.header)
        scratch = (
            torch.empty(R, shape.I, device=DEVICE, dtype=torch.bfloat16),
            torch.empty(R, shape.H, device=DEVICE),
        )
        runs = [
            partial(run, shape, layer, x, one, torch.empty_like(x), scratch, programs)
            for layer, one in zip(layers, ones, strict=True)
        ]
        cuts: dict[str, CudaDecodeTiles | None] = {"chosen": None}
        cuts |= {cut: parsed(cut) for cut in asked}
        recorded = {
            label: record([partial(one, tiles) for one in runs], limit, REPEATS)
            for label, tiles in cuts.items()
        }
        samples = time_in_turns(recorded, 0.0)
        for label, replays in recorded.items():
            timed = Percentiles.of(samples[label])
            # Each situation has its own output, so this is of the first one's weights and picks.
            found, _ = errors(shape, layers[0], x, ones[0], replays.graphs[0]())
            row = BenchRow(
                impl=f"fusedmoe:cuda {label}", **shape.columns, T=T, format=fmt, routing="balanced",
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
            near &= found <= MOST_ERROR
        del recorded
        gc.collect()
    return near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--tiles", nargs="+", default=[])
    parser.add_argument("--out")
    args = parser.parse_args()
    report = BenchReport(make_header(DEVICE, measure_ceilings(DEVICE, (torch.bfloat16,))))
    near = True
    for case in args.cases:
        with torch.inference_mode():
            near &= measure(case, args.tiles, report)
        gc.collect()
        torch.cuda.empty_cache()
        if args.out:
            report.write(args.out)
    if not near:
        raise SystemExit(f"an error is above {MOST_ERROR}")


if __name__ == "__main__":
    main()
