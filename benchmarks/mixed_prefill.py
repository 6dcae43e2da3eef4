"""Speed of prefill with quantized weights and 16-bit rows on one GPU, launch by launch and tile by
tile.

    PYTHONPATH=src python benchmarks/mixed_prefill.py [--shapes qwen3-30b gpt-oss-120b mixtral]
        [--formats int4_g128 mxfp4] [--tokens 2048 4096 8192] [--routing balanced] [--out F.json]

CUDA-graph replays in turns with a dense bf16 product, so that all of them see the same clock; ids
given. Formats that a shape's columns do not fit are left out. Launches for blocks of 256 slots and
for what is left beside them count all operations each. ``whole`` is everything
behind the routing, ``triton_quantized`` the layer on plain Triton. The errors are against fp64, on
a few tokens.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial

import torch
from quantized_layer import DENSE, DEVICE, build, dense, errors, situations, weights_of
from quantized_prefill import Calls, add_parts, in_turns
from quantized_targets import SHAPES

from fusedmoe.activation import MoEActivation
from fusedmoe.bench import BenchReport, LayerShape
from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.problems import Situation
from fusedmoe.bench.report import make_header
from fusedmoe.kernels.align import MoEAlignment
from fusedmoe.kernels.device import multiprocessors_of
from fusedmoe.kernels.hopper_mixed_prefill import (
    mixed_prefill,
    mixed_prefill_rows,
    mixed_prefill_tables,
    wide_rows,
)
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.triton.hopper_mixed_prefill import (
    Scales,
    down,
    shares_of,
    up,
    wants_lane_order,
)
from fusedmoe.quantization.formats import format_named
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS
from fusedmoe.tuning.mixed_tiles import MixedPrefillTiles, mixed_prefill_tiles


def tile_variants(bits: float, *, wide: bool) -> dict[str, MixedPrefillTiles]:
    """Those for few, some and many slots per expert."""
    found = [mixed_prefill_tiles(mean, 1, (bits, bits), wide=wide) for mean in (48, 128, 256)]
    return {f"{tiles.gemm1.rows} x {tiles.gemm1.slots}": tiles for tiles in found}


def recounted(tables: MoEAlignment, R: int, launch: Callable[..., None], *given: object) -> None:
    """``launch`` with counters as alignment leaves them: one small launch more."""
    tables.sorted_ids[-COUNTER_SLOTS:].fill_(R)
    launch(*given)


def parts(
    shape: LayerShape,
    name: str,
    layer: MoERunner,
    x: torch.Tensor,
    one: Situation,
    out: torch.Tensor,
) -> Calls:
    """Every launch by itself and all of them, and the floating point operations of each."""
    w1, w2 = weights_of(layer)
    method = layer.routed_experts.quant_method
    config = method.get_fused_moe_quant_config(layer.routed_experts)
    (e, H, I), (T, K) = w2.shape, one.topk_ids.shape  # noqa: E741
    activation = MoEActivation.from_str(shape.activation)
    position = torch.empty(T * K, dtype=torch.int32, device=DEVICE)
    wide = wide_rows(w1.format, w2.format)
    scales = Scales.of(w1), Scales.of(w2)
    programs, flops = multiprocessors_of(DEVICE), shape.flops(T)
    calls: Calls = {}
    for label, tiles in tile_variants(w1.format.bits, wide=wide).items():
        P = mixed_prefill_rows(T * K, e, tiles)
        act = torch.empty(P, I, dtype=torch.bfloat16, device=DEVICE)
        y = torch.empty(P, H, dtype=torch.float32 if wide else torch.bfloat16, device=DEVICE)
        tables = mixed_prefill_tables(one.topk_ids, e, None, tiles)
        given = LayerTensors(
            x, w1, w2, one.topk_weights, one.topk_ids, out, act, y, programs, activation, None,
            config.w1_bias, config.w2_bias,
        )  # fmt: skip
        whole = partial(mixed_prefill, given, tiles)
        share = w1.shards / (w1.shards + 1)
        for blocks, (first_tile, second_tile) in shares_of(tiles).items():
            first = given, x, scales[0], position, tables, first_tile, blocks
            second = given, act, scales[1], tables, second_tile, blocks
            begin = partial(up, ordered=wants_lane_order(w2))
            calls[f"up {label} {blocks}"] = (
                partial(recounted, tables, T * K, begin, *first),
                flops * share,
            )
            calls[f"down {label} {blocks}"] = (
                partial(recounted, tables, T * K, down, *second),
                flops * (1 - share),
            )
        calls[f"whole {label}"] = whole, flops
    return calls


def measure(shape: LayerShape, name: str, T: int, routing: str, report: BenchReport) -> None:
    layer = build(shape, name, "triton_quantized")
    x = torch.randn(T, shape.H, device=DEVICE, dtype=torch.bfloat16)
    (one,), out = situations(shape, routing, T, 1), torch.empty_like(x)
    calls = parts(shape, name, layer, x, one, out)
    calls["triton_quantized"] = partial(layer, x, one.logits), shape.flops(T)
    calls["dense"] = dense("bf16"), 2.0 * DENSE**3
    samples = in_turns(calls)
    about = {"shape": shape.name, "format": name, "T": T}
    bits = weights_of(layer)[0].format.bits
    for label in tile_variants(bits, wide=False):
        calls[f"whole {label}"][0]()
        found, _ = errors(shape, layer, x, one, out)
        report.rows.append(about | {"part": f"error {label}", "error": found})
        print(f"{label}: error {found:.1e}", flush=True)
    add_parts(report, about | {"routing": routing}, calls, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b", "gpt-oss-120b", "mixtral"])
    parser.add_argument("--formats", nargs="+", default=["int4_g128", "mxfp4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--routing", default="balanced")
    parser.add_argument("--out")
    args = parser.parse_args()
    report = BenchReport(make_header(DEVICE, measure_ceilings(DEVICE, (torch.bfloat16,))))
    for shape in (SHAPES[name] for name in args.shapes):
        for name in args.formats:
            group = format_named(name).group.col
            if group > 0 and (shape.H % group or shape.I % group):
                continue
            for T in args.tokens:
                with torch.inference_mode():
                    measure(shape, name, T, args.routing, report)
                gc.collect()
                torch.cuda.empty_cache()
                if args.out:
                    report.write(args.out)


if __name__ == "__main__":
    main()
