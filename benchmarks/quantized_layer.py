"""Quantized layers from router logits on one GPU, against what ``quantized_targets`` asks.

    PYTHONPATH=src python benchmarks/quantized_layer.py [--formats int4_g128 ...] [--shapes ...]
        [--tokens 1 8 ...] [--routings balanced ...] [--experts triton_quantized hopper_quantized]
        [--out benchmarks/results/h200/quantized.json] [--only-report] [--join other.json ...]

Weights are random bytes with random scales; the rows go in as bf16. Ceilings are measured in the
same run, those of fp8 and int8 products too; where they are not an H200's, it ends there. Uniform
routing is measured from given picks, as the peers in ``peers_h200_quantized.json`` were. Errors are
relative (Frobenius) against fp64 on the dequantized weights; ``rounding_error`` is what rounding
the rows alone costs. What was asked of each row is in the file (``targets``), a CSV and a PNG of
the rows lie beside it. ``--join`` measures nothing: rows of other runs take the places of theirs in
``--out``, and each says which of ``runs`` it is of.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from h200_ceilings import h200_ceilings
from pictures import draw
from quantized_targets import ROWS, SHAPES, Cell, cells_asked, verdicts
from verdicts import print_verdicts

from fusedmoe import FusedMoE, MoEOptions, QuantizedFusedMoEMethod
from fusedmoe.activation import MoEActivation
from fusedmoe.bench import BenchReport, LayerShape
from fusedmoe.bench.ceilings import median_seconds
from fusedmoe.bench.problems import Scope, Situation, pick
from fusedmoe.bench.replays import record, time_in_turns
from fusedmoe.bench.report import BenchRow, Percentiles, least_us, make_header
from fusedmoe.bench.timing import Call
from fusedmoe.experts.torch_quantized import quantized_experts_reference
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.formats.superblocks import CODECS
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.testing.routing import routing_logits
from fusedmoe.testing.tolerances import relative_error

DEVICE = torch.device("cuda")
SITUATIONS, REPEATS, CHECKED, DENSE = 4, 50, 3, 8192
# Of random bytes as numbers; with superblocks' own scales, likewise.
DEVIATIONS = {"e4m3": 1.0, "int8": 73.0, "int4": 4.3, "e2m1": 3.0, "nf4": 0.5, "iq4_nl": 67.0}
DEVIATIONS |= {"e3m2": 9.2, "e2m3": 3.4, "q4_k": 310.0, "q5_k": 650.0, "q6_k": 1370.0}
DEVIATIONS |= {"q2_k": 13.4, "q3_k": 43.0, "q4_1": 9.8, "q5_1": 19.0}
ABOUT_A_RUN = (
    *("commit", "command", "date", "read_gbs", "copy_gbs", "bf16_tflops"),
    *("fp8_tflops", "int8_tops"),
)
RATE_OF = {"e4m3": "fp8_tflops", "int8": "int8_tops", "int4": "fp8_tflops"}


def weights_named(name: str) -> QuantFormat:
    """Of the weights alone: ``<weights>_by_<rows>`` says how rows are rounded, too."""
    return format_named(name.partition("_by_")[0])


class OneFormat:
    """A QuantizationConfig: one format for all layers."""

    def __init__(self, name: str) -> None:
        self.format, self.rows = weights_named(name), ROWS.get(name)

    def get_quant_method(self, moe_config: Any, prefix: str) -> QuantizedFusedMoEMethod:
        return QuantizedFusedMoEMethod(moe_config, self.format, activation=self.rows)


def dense(element: str) -> Callable[[], torch.Tensor]:
    """A product of DENSE x DENSE in the element type: "e4m3", "int8" or "bf16"."""
    a, b = (torch.randn(DENSE, DENSE, device=DEVICE) for _ in range(2))
    if element == "bf16":
        return partial(torch.mm, a.bfloat16(), b.bfloat16())
    if element == "int8":
        return partial(torch._int_mm, a.mul(30).to(torch.int8), b.mul(30).to(torch.int8).t())
    one = torch.ones((), device=DEVICE)
    operands = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    return partial(torch._scaled_mm, *operands, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def eight_bit_rates() -> dict[str, float]:
    """Dense products in fp8 (TFLOP/s) and int8 (TOP/s)."""
    elements = {"fp8_tflops": "e4m3", "int8_tops": "int8"}
    return {
        name: 2 * DENSE**3 / median_seconds(dense(element), DEVICE) / 1e12
        for name, element in elements.items()
    }


def fill(parameter: torch.nn.Parameter, fmt: QuantFormat, suffix: str, K: int) -> None:
    """Random bytes for data, scales that keep the size of what goes through."""
    data, shape = parameter.data, parameter.shape
    size = DEVIATIONS[fmt.element] * K**0.5
    if fmt.element in CODECS:
        # Scales lie in the superblocks, as fp16: that of all, and that of all minima.
        data.copy_(torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE))
        where = CODECS[fmt.element].floats
        scale = torch.full(((where.stop - where.start) // 2,), 1 / size, device=DEVICE)
        data.unflatten(-1, (-1, fmt.type.stored))[..., where] = scale.half().view(torch.uint8)
    elif suffix == "weight" and fmt.element == "e4m3":
        for part in data:
            part.copy_(torch.randn(part.shape, device=DEVICE))
    elif suffix == "weight":
        bytes_ = data.view(torch.uint8)
        bytes_.copy_(torch.randint(0, 256, bytes_.shape, dtype=torch.uint8, device=DEVICE))
    elif suffix == "weight_scale" and fmt.scale_kind == "e8m0":
        middle = 127 - round(torch.tensor(size).log2().item())
        data.copy_(torch.randint(middle - 1, middle + 2, shape, dtype=torch.uint8, device=DEVICE))
    elif suffix == "weight_scale":
        spread = torch.rand(shape, device=DEVICE) + 0.5
        data.copy_(spread if fmt.second_scale else spread / size)
    elif suffix == "weight_scale_2":
        data.fill_(1 / size)
    elif suffix == "weight_group_index":
        # All shards of an expert have one order: they see the same rows.
        order = torch.rand(shape[0], shape[-1], device=DEVICE).argsort(-1) // fmt.group.col
        data.copy_(order.view(shape[0], *(1,) * (data.dim() - 2), -1).expand(shape))
    elif suffix == "weight_zero_point":
        data.copy_(torch.randint(6, 11, shape, device=DEVICE))
    elif suffix == "input_scale":
        data.fill_(0.1)  # few values saturate
    else:
        data.copy_(torch.randn(shape, device=DEVICE) * 0.1)


def build(shape: LayerShape, name: str, experts: str | None) -> MoERunner:
    with DEVICE:
        layer = FusedMoE(
            shape.num_experts,
            shape.k,
            shape.H,
            shape.I,
            params_dtype=torch.bfloat16,
            quant_config=OneFormat(name),
            activation=shape.activation,
            has_bias=shape.bias,
            options=MoEOptions(experts=experts),
        )
    routed, fmt = layer.routed_experts, weights_named(name)
    for full, parameter in routed.named_parameters():
        owner, _, suffix = full.partition("_")
        fill(parameter, fmt, suffix, shape.H if owner == "w13" else shape.I)
    routed.quant_method.process_weights_after_loading(routed)
    return layer


def share_weights(source: MoERunner, target: MoERunner) -> None:
    """The second layer reads the first one's weights."""
    routed = target.routed_experts
    for name, parameter in source.routed_experts.named_parameters():
        setattr(routed, name, parameter)
    routed.quant_method.process_weights_after_loading(routed)


def weights_of(layer: MoERunner) -> tuple[QuantizedTensor, QuantizedTensor]:
    method: Any = layer.routed_experts.quant_method
    return method.quantized_weights(layer.routed_experts)


def errors(
    shape: LayerShape, layer: MoERunner, x: torch.Tensor, one: Situation, out: torch.Tensor
) -> tuple[float, float]:
    """(of the output, of rounding the rows alone), on a few tokens."""
    w1, w2 = weights_of(layer)
    method: Any = layer.routed_experts.quant_method
    config = method.get_fused_moe_quant_config(layer.routed_experts)
    method.finish_weights(layer.routed_experts)  # the scales of activations, into this config too
    tokens = sorted({0, x.shape[0] // 2, x.shape[0] - 1})[:CHECKED]
    reference = partial(
        quantized_experts_reference,
        x[tokens].double(),
        w1,
        w2,
        one.topk_weights[tokens].double(),
        one.topk_ids[tokens],
        activation=MoEActivation.from_str(shape.activation),
        w1_bias=config.w1_bias,
        w2_bias=config.w2_bias,
        compute_dtype=torch.float64,
    )
    exact = reference()
    rounded = exact if config.a1.key is None else reference(a1=config.a1, a2=config.a2)
    return (
        relative_error(out[tokens], exact).frobenius,
        relative_error(rounded, exact).frobenius,
    )


def situations(shape: LayerShape, routing: str, T: int, count: int) -> list[Situation]:
    """With logits in bf16, one per seed."""
    drawn = (
        routing_logits(routing, T, shape.num_experts, shape.k, seed, DEVICE)
        for seed in range(count)
    )
    return [pick(logits.bfloat16(), shape.k) for logits in drawn]


def limit_us(
    shape: LayerShape,
    weights: tuple[QuantizedTensor, ...],
    key: QuantKey | None,
    active: float,
    T: int,
    peak: dict[str, float],
) -> float:
    """As the reports have it, with weights and scales as they are stored."""
    stored = sum(w.nbytes for w in weights) / shape.E * active + 4 * T * shape.H
    rate = (
        peak["bf16_tflops"]
        if key is None
        else peak[RATE_OF.get(weights[0].format.element, "bf16_tflops")]
    )
    return least_us(stored, shape.flops(T), peak["read_gbs"], rate)


def measure(
    shape: LayerShape,
    name: str,
    cells: Sequence[Cell],
    experts: Sequence[str | None],
    report: BenchReport,
) -> None:
    """All problems of one shape and format; results are checked where a layer is measured."""
    copies = [build(shape, name, experts[0])]
    free, _ = torch.cuda.mem_get_info()
    size = sum(w.nbytes for w in weights_of(copies[0]))
    copies += [
        build(shape, name, experts[0]) for _ in range(min(SITUATIONS - 1, int(free * 0.5) // size))
    ]
    layers = {experts[0] or "fusedmoe": copies}
    for other in experts[1:]:
        layers[other or "fusedmoe"] = [build(shape, name, other) for _ in copies]
        for source, target in zip(copies, layers[other or "fusedmoe"], strict=True):
            share_weights(source, target)
    for routing, scope, T in cells:
        x = torch.randn(T, shape.H, device=DEVICE, dtype=torch.bfloat16)
        picked = situations(shape, routing, T, max(SITUATIONS, len(copies)))
        active = statistics.mean(one.topk_ids.unique().numel() for one in picked)
        limit = limit_us(shape, weights_of(copies[0]), ROWS.get(name), active, T, report.header)
        recorded = {}
        for impl, own in layers.items():
            calls = [call(own[i % len(own)], scope, x, one) for i, one in enumerate(picked)]
            recorded[impl] = record(calls, limit, REPEATS)
        samples = time_in_turns(recorded, 1.0 if T * shape.k > 64 * active else 0.0)
        for impl, replays in recorded.items():
            timed = Percentiles.of(samples[impl])
            first = layers[impl][0]
            found, rounding = errors(shape, first, x, picked[0], replays.graphs[0]())
            row = BenchRow(
                impl=impl if impl == "fusedmoe" else f"fusedmoe:{impl}",
                **shape.columns, T=T, format=name, routing=routing, active_experts=active,
                pairs=float(T * shape.k), scope=scope, timed="graph", **asdict(timed),
                limit_us=limit, fraction_of_limit=limit / timed.us, error=found,
                tflops=shape.flops(T) / timed.us / 1e6, runs=len(samples[impl]),
                workspace_bytes=None,
            )  # fmt: skip
            report.add(row)
            report.rows[-1]["rounding_error"] = rounding
            print(
                f"{shape.name:16} {name:12} {impl:18} T={T:6} {timed.us:9.1f} us "
                f"{100 * limit / timed.us:5.1f} % {row.tflops:7.1f} TF  {routing}"
                + ("" if scope == "layer" else f" ({scope})")
                + f" error {found:.1e} (rows alone {rounding:.1e})",
                flush=True,
            )
        del recorded
        gc.collect()
        torch.cuda.empty_cache()


def run_once(
    shape: LayerShape, name: str, cells: Sequence[Cell], experts: Sequence[str | None]
) -> None:
    """Every problem once, for its kernels to be in their caches."""
    for one in experts:
        layer = build(shape, name, one)
        for routing, scope, T in cells:
            x = torch.randn(T, shape.H, device=DEVICE, dtype=torch.bfloat16)
            call(layer, scope, x, situations(shape, routing, T, 1)[0])()
    torch.cuda.synchronize()


def call(layer: MoERunner, scope: Scope, x: torch.Tensor, one: Situation) -> Call:
    if scope == "layer":
        return partial(layer, x, one.logits)
    return partial(layer.routed_experts.forward_modular, x, *one[1:], None, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--routings", nargs="+", default=["balanced", "power_law_1.2", "uniform"])
    parser.add_argument("--experts", nargs="+", default=[None], help="default: what is selected")
    parser.add_argument("--warm", action="store_true", help="only compile: every problem once")
    parser.add_argument("--seconds", type=float, help="start no new layer after so long")
    parser.add_argument("--out")
    parser.add_argument("--only-report", action="store_true", help="measure nothing, read --out")
    parser.add_argument("--join", nargs="+", default=[], help="tables whose rows --out takes in")
    args = parser.parse_args()
    reads = args.only_report or args.join
    if reads and not args.out:
        parser.error("--only-report and --join read --out")
    report = BenchReport.read(args.out) if reads else measured(args)
    for other in args.join:
        take_in(report, BenchReport.read(other))
    print(*report.notes, sep="\n")
    print_verdicts(verdicts(report.rows))
    if args.out and report.rows:
        write(report, Path(args.out))


def take_in(report: BenchReport, other: BenchReport) -> None:
    """Put another run's rows in the places of theirs. The header becomes that run's."""
    runs = report.header.get("runs", [about(report)])
    problem = itemgetter("shape", "format", "routing", "scope", "T", "impl")
    anew = set(map(problem, other.rows))
    report.rows[:] = [
        *(row | {"run": row.get("run", 0)} for row in report.rows if problem(row) not in anew),
        *(row | {"run": len(runs)} for row in other.rows),
    ]
    report.header |= other.header | {"runs": [*runs, about(other)]}


def about(report: BenchReport) -> dict[str, Any]:
    """When a run was and what its GPU reached, as far as it was measured."""
    return {name: value for name, value in report.header.items() if name in ABOUT_A_RUN}


def write(report: BenchReport, path: Path) -> None:
    """With what was asked of the rows, as CSV, and drawn."""
    report.header["targets"] = [asdict(one) for one in verdicts(report.rows)]
    report.write_with_csv(path)
    draw(report.to_json(), path.with_suffix(".png"))


def measured(args: argparse.Namespace) -> BenchReport:
    """Every cell that was asked for, the file growing layer by layer."""
    begin = time.monotonic()
    header = make_header(DEVICE, h200_ceilings(DEVICE) | eight_bit_rates())
    report = BenchReport(header)
    for (shape, fmt), asked in cells_asked().items():
        cells = [
            cell
            for cell in asked
            if cell.routing in args.routings and (args.tokens is None or cell.T in args.tokens)
        ]
        if args.formats is not None and fmt not in args.formats:
            continue
        if (args.shapes is not None and shape not in args.shapes) or not cells:
            continue
        if args.seconds is not None and time.monotonic() - begin > args.seconds:
            report.notes.append(f"{shape} {fmt}: left out, time was up")
            continue
        with torch.inference_mode():
            if args.warm:
                run_once(SHAPES[shape], fmt, cells, args.experts)
            else:
                measure(SHAPES[shape], fmt, cells, args.experts, report)
        gc.collect()
        torch.cuda.empty_cache()
        if args.out:
            report.write(args.out)
    return report


if __name__ == "__main__":
    main()
