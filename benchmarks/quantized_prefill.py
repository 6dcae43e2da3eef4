"""Speed of the 8-bit prefill kernels on one GPU, launch by launch and tile by tile.

    PYTHONPATH=src python benchmarks/quantized_prefill.py [--shapes qwen3-30b deepseek-v3-ep8]
        [--formats fp8_block fp8_channel fp8_tensor int8_channel] [--tokens 8192] [--out F.json]

CUDA-graph replays in turns with a dense product of the same element type, so that all of them see
the same clock; balanced routing, ids given. ``whole`` is everything behind the routing,
``triton_quantized`` the layer on plain Triton. The errors are against fp64, on a few tokens.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from quantized_layer import DENSE, DEVICE, REPEATS, build, dense, errors, situations, weights_of
from quantized_targets import ROWS, SHAPES

from fusedmoe.activation import MoEActivation
from fusedmoe.bench import BenchReport, LayerShape
from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.problems import Situation
from fusedmoe.bench.replays import record, time_in_turns
from fusedmoe.bench.report import Percentiles, make_header
from fusedmoe.kernels.align import MoEAlignment, moe_align_block_size
from fusedmoe.kernels.device import multiprocessors_of
from fusedmoe.kernels.hopper_fp8_prefill import fp8_prefill
from fusedmoe.kernels.hopper_prefill import PREFILL_BLOCK, prefill_rows
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.quantize import QuantizedRows, quantize_rows
from fusedmoe.kernels.triton.hopper_fp8_prefill import down, up
from fusedmoe.kernels.triton.hopper_prefill import sum_rows
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.hopper_tiles import COUNTER_SLOTS
from fusedmoe.tuning.quantized_tiles import QuantizedPrefillTiles, prefill_tiles

Calls = dict[str, tuple[Callable[[], Any], float]]


def tile_variants(name: str, standard: QuantizedPrefillTiles) -> Iterator[tuple[str, Any]]:
    """What else to try: (label, tiles)."""
    yield "", standard
    yield " group 32", replace(standard, group=32)
    if name != "fp8_block" and max(standard.promoted):
        yield " promoted at once", replace(standard, promoted=(1, 1))
        yield " not promoted", replace(standard, promoted=(0, 0))


def parts(
    shape: LayerShape,
    name: str,
    weights: tuple[QuantizedTensor, QuantizedTensor],
    x: torch.Tensor,
    one: Situation,
    out: torch.Tensor,
) -> Calls:
    """Every launch by itself and all of them, and the floating point operations of each."""
    (w1, w2), key = weights, ROWS[name]
    (e, H, I), (T, K) = w2.shape, one.topk_ids.shape  # noqa: E741
    scale = torch.full((1,), 0.1, device=DEVICE) if key.static else None
    P, R = prefill_rows(T * K, e), T * K
    activation = MoEActivation.from_str(shape.activation)
    act = torch.empty(P, I, dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty(P, H, dtype=torch.bfloat16, device=DEVICE)
    position = torch.empty(R, dtype=torch.int32, device=DEVICE)
    tables = MoEAlignment(
        *moe_align_block_size(
            one.topk_ids,
            PREFILL_BLOCK,
            e,
            pad_sorted_ids=True,
            num_local_experts=e,
            spare_slots=COUNTER_SLOTS,
        )[:3]
    )
    counters = tables.sorted_ids[-COUNTER_SLOTS:]
    programs = multiprocessors_of(DEVICE)
    q, q_scale = quantize_rows(x, key, scale)
    flops = shape.flops(T)
    calls: Calls = {"quantize x": (lambda: quantize_rows(x, key, scale)[0], 0.0)}

    given = LayerTensors(
        x, w1, w2, one.topk_weights, one.topk_ids, out, act, y, programs, activation
    )

    def first(tiles: QuantizedPrefillTiles) -> QuantizedRows:
        counters.fill_(R)
        return up(given, QuantizedRows(q, q_scale), position, key, scale, tables, tiles)

    def second(made: QuantizedRows, tiles: QuantizedPrefillTiles) -> torch.Tensor:
        counters.fill_(R)
        down(given, made, tables, tiles)
        return y

    def everything(tiles: QuantizedPrefillTiles) -> torch.Tensor:
        fp8_prefill(given, (key, key), (scale, scale), tiles)
        return out

    def add() -> torch.Tensor:
        sum_rows(given, position)
        return out

    def align() -> torch.Tensor:
        return moe_align_block_size(
            one.topk_ids, PREFILL_BLOCK, e, pad_sorted_ids=True, num_local_experts=e
        )[0]

    calls["sum"] = add, 0.0
    calls["align"] = align, 0.0
    for label, tiles in tile_variants(name, prefill_tiles(R, e, H, I, w1.format.element)):
        calls[f"up{label}"] = partial(first, tiles), flops * w1.shards / (w1.shards + 1)
        made = first(tiles)
        calls[f"down{label}"] = partial(second, made, tiles), flops / (w1.shards + 1)
        calls[f"whole{label}"] = partial(everything, tiles), flops
    return calls


def in_turns(calls: Calls) -> dict[str, list[float]]:
    """Microseconds of each, from graph replays."""
    return time_in_turns(
        {
            label: record([call], max(flops / 1e9, 20.0), REPEATS)
            for label, (call, flops) in calls.items()
        }
    )


def add_parts(
    report: BenchReport, about: dict[str, Any], calls: Calls, samples: dict[str, list[float]]
) -> None:
    """A row for each, and a line of what it says."""
    for label, (_, flops) in calls.items():
        us = Percentiles.of(samples[label]).us
        tflops = flops / us / 1e6
        report.rows.append(about | {"part": label, "us": us, "tflops": tflops})
        print(
            f"{about['shape']:16} {about['format']:12} T={about['T']:6} {label:20} {us:9.1f} us "
            f"{tflops:7.1f} TF",
            flush=True,
        )


def measure(shape: LayerShape, name: str, T: int, report: BenchReport) -> None:
    layer = build(shape, name, "triton_quantized")
    weights = weights_of(layer)
    x = torch.randn(T, shape.H, device=DEVICE, dtype=torch.bfloat16)
    (one,) = situations(shape, "balanced", T, 1)
    out = torch.empty_like(x)
    calls = parts(shape, name, weights, x, one, out)
    calls["triton_quantized"] = partial(layer, x, one.logits), shape.flops(T)
    calls["dense"] = dense(weights[0].format.element), 2.0 * DENSE**3
    samples = in_turns(calls)
    calls["whole"][0]()
    found, rounding = errors(shape, layer, x, one, out)
    about = {"shape": shape.name, "format": name, "T": T}
    add_parts(report, about, calls, samples)
    print(f"error {found:.1e} (rows alone {rounding:.1e})", flush=True)
    report.rows.append(about | {"part": "error", "error": found, "rounding_error": rounding})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b", "deepseek-v3-ep8"])
    parser.add_argument(
        "--formats", nargs="+", default=["fp8_block", "fp8_channel", "fp8_tensor", "int8_channel"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--out")
    args = parser.parse_args()
    report = BenchReport(make_header(DEVICE, measure_ceilings(DEVICE, (torch.bfloat16,))))
    for shape in args.shapes:
        for name in args.formats:
            for T in args.tokens:
                with torch.inference_mode():
                    measure(SHAPES[shape], name, T, report)
                gc.collect()
                torch.cuda.empty_cache()
                if args.out:
                    report.write(args.out)


if __name__ == "__main__":
    main()
