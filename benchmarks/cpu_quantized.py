"""Integer weights against floats on the CPU: one layer from router logits, by format.

    python benchmarks/cpu_quantized.py [--out benchmarks/results/cpu/quantized.json]

OLMoE and a quarter-width Mixtral, T = 1, 4 and 16, taken in turns, medians; the ratio is the faster
of our fp32 and bf16 layers over the format's (above 1: the format is faster). Rows are bf16, errors
relative (Frobenius) to fp64 on the dequantized weights. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial

import torch

from fusedmoe import FusedMoE, explain, quantize_layer
from fusedmoe.bench import SHAPES, BenchReport, BenchRow, LayerShape
from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.report import Percentiles, make_header
from fusedmoe.bench.timing import time_on_cpu
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.quantization.keys import INT8_DYNAMIC_TOKEN
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.testing.routing import routing_logits
from fusedmoe.testing.tolerances import relative_error

# Name in the report -> (format, what the rows are rounded to).
FORMATS = {
    "int8": ("int8_channel", INT8_DYNAMIC_TOKEN),
    "int8_w8a16": ("int8_channel", None),
    "int4_g32": ("int4_g32", None),
    "int4_g128": ("int4_g128", None),
}
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SITUATIONS = 4


def build(shape: LayerShape, name: str) -> MoERunner:
    """A random layer of one format."""
    torch.manual_seed(0)
    dtype = FLOATS.get(name, torch.bfloat16)
    layer = FusedMoE(shape.E, shape.k, shape.H, shape.I, dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    layer.routed_experts.process_weights_after_loading()
    if name in FORMATS:
        fmt, activation = FORMATS[name]
        quantize_layer(layer, fmt, activation=activation)
    return layer


def error_of(layer: MoERunner, x: torch.Tensor, logits: torch.Tensor) -> float:
    experts = layer.routed_experts
    if hasattr(experts.quant_method, "quantized_weights"):
        weights = experts.quant_method.quantized_weights(experts)
        w13, w2 = (w.dequantize(torch.float32) for w in weights)
    else:
        w13, w2 = experts.w13_weight, experts.w2_weight
    picked = layer.router.select_experts(x, logits)
    exact = experts_reference(x.double(), w13, w2, *picked, compute_dtype=torch.float64)
    return relative_error(layer(x, logits), exact).frobenius


def stored_bytes(layer: MoERunner) -> int:
    return sum(tensor.nbytes for tensor in layer.routed_experts.state_dict().values())


def measure(shape: LayerShape, tokens: list[int], repeats: int, report: BenchReport) -> None:
    layers = {name: build(shape, name) for name in (*FLOATS, *FORMATS)}
    for T in tokens:
        logits = [
            routing_logits("uniform", T, shape.E, shape.k, seed) for seed in range(SITUATIONS)
        ]
        picked = [one.topk(shape.k).indices.unique().numel() for one in logits]
        active = sum(picked) / len(picked)
        rows = {
            name: torch.randn(T, shape.H, dtype=FLOATS.get(name, torch.bfloat16)) for name in layers
        }
        calls = {
            name: [partial(layer, rows[name], one) for one in logits]
            for name, layer in layers.items()
        }
        samples = time_on_cpu(calls, repeats)
        times = {name: Percentiles.of(taken) for name, taken in samples.items()}
        best = min(times[name].us for name in FLOATS)
        for name, layer in layers.items():
            moved = stored_bytes(layer) / shape.E * active + 2 * T * shape.H * rows[name].itemsize
            limit = moved / report.header["read_gbs"] / 1e3
            report.add(
                BenchRow(
                    impl="fusedmoe",
                    shape=shape.name,
                    E=shape.E,
                    num_experts=shape.E,
                    k=shape.k,
                    H=shape.H,
                    I=shape.I,
                    T=T,
                    format=name,
                    routing="uniform",
                    active_experts=active,
                    pairs=float(T * shape.k),
                    scope="layer",
                    timed="launches",
                    **asdict(times[name]),
                    limit_us=limit,
                    fraction_of_limit=limit / times[name].us,
                    tflops=shape.flops(T) / times[name].us / 1e6,
                    error=error_of(layer, rows[name][:4], logits[0][:4]),
                    runs=len(samples[name]),
                    workspace_bytes=None,
                )
            )
            print(
                f"{shape.name:16} {name:11} T={T:<3} {times[name].us:9.1f} us "
                f"{best / times[name].us:5.2f}x  {explain(layer).chosen.name:14} "
                f"error {report.rows[-1]['error']:.1e}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="where to write the report, as JSON")
    parser.add_argument("--shapes", nargs="+", default=["olmoe", "mixtral-quarter"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    device = torch.device("cpu")
    ceilings = measure_ceilings(device, tuple(FLOATS.values()))
    report = BenchReport(make_header(device, ceilings))
    with torch.inference_mode():
        for name in args.shapes:
            measure(SHAPES[name], args.tokens, args.repeats, report)
    if args.out:
        report.write(args.out)


if __name__ == "__main__":
    main()
