"""Layers of the formats that the quantized table leaves out, on one GPU, from router logits: MXFP8,
NVFP4, MXFP6, NF4, GGUF's, GPTQ's act-order, int4 by fp8, and rows whose format is emulated, beside
plain int4 and bf16 rows.

    PYTHONPATH=src python benchmarks/packed_formats.py [--formats q4_k ...] [--shapes qwen3-30b ...]
        [--tokens 1 8 64 2048] [--experts triton_quantized] [--warm] [--append]
        [--out benchmarks/results/h200/packed_formats.json]

As ``quantized_layer.py``: random weights, bf16 rows, the limit from bytes as stored and rates
measured in the run, errors against fp64 on the dequantized weights. A CSV lies beside the file.
``--append`` keeps the rows that the file has, measured in other runs (``runs``), and goes on.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from h200_ceilings import h200_ceilings
from quantized_layer import DEVICE, about, eight_bit_rates, measure, run_once
from quantized_targets import SHAPES, Cell

from fusedmoe.bench import BenchReport
from fusedmoe.bench.report import make_header

FORMATS = (
    *("int4_g128", "int4_g128_by_fp8", "int4_g128_act_order", "int8_g128", "int8_g128_act_order"),
    *("mxfp8", "mxfp6_e3m2", "mxfp6_e2m3", "nvfp4", "nf4", "iq4_nl"),
    *("q2_k", "q3_k", "q4_1", "q5_1", "q4_k", "q5_k", "q6_k"),
    *("mxfp8_by_mxfp8", "mxfp4_by_mxfp4", "mxfp6_e3m2_by_mxfp6", "nvfp4_by_nvfp4"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 2048])
    parser.add_argument("--experts", nargs="+", default=[None], help="default: what is selected")
    parser.add_argument("--warm", action="store_true", help="only compile: every problem once")
    parser.add_argument("--append", action="store_true", help="leave out what --out has")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.append and not args.out:
        parser.error("--append goes on with --out")
    cells = [Cell("balanced", "layer", T) for T in args.tokens]
    rates = {} if args.warm else h200_ceilings(DEVICE) | eight_bit_rates()
    report = BenchReport(make_header(DEVICE, rates))
    runs = report.header["runs"] = [about(report)]
    if args.append and Path(args.out).exists():
        before = BenchReport.read(args.out)
        report.rows += before.rows
        runs[:0] = before.header["runs"]
    done = {(row["shape"], row["format"]) for row in report.rows}
    for shape in args.shapes:
        for name in args.formats:
            if (shape, name) in done:
                continue
            with torch.inference_mode():
                if args.warm:
                    run_once(SHAPES[shape], name, cells, args.experts)
                else:
                    measure(SHAPES[shape], name, cells, args.experts, report)
                    for row in report.rows:
                        row.setdefault("run", len(runs) - 1)
            gc.collect()
            torch.cuda.empty_cache()
            if args.out and report.rows:
                report.write_with_csv(Path(args.out))


if __name__ == "__main__":
    main()
