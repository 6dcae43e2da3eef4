"""Layers of the formats that no other package runs as experts, on one GPU, from router logits:
GGUF's, NF4, MXFP6, GPTQ's act-order, int4 by fp8 and rows whose format is emulated, as Triton runs
them, beside plain int4.

    PYTHONPATH=src python benchmarks/packed_formats.py [--formats q4_k ...] [--shapes qwen3-30b ...]
        [--tokens 1 8 64 2048] [--out F.json]

As ``quantized_layer.py``: random weights, bf16 rows, the limit from bytes as stored and rates
measured in the run, errors against fp64 on the dequantized weights.
"""

from __future__ import annotations

import argparse
import gc

import torch
from quantized_layer import DEVICE, eight_bit_rates, measure
from quantized_targets import SHAPES, Cell

from fusedmoe.bench import BenchReport
from fusedmoe.bench.ceilings import measure_ceilings
from fusedmoe.bench.report import make_header

FORMATS = (
    *("q4_k", "q5_k", "q6_k", "iq4_nl", "nf4", "mxfp6_e3m2", "mxfp6_e2m3"),
    *("int4_g128_act_order", "int8_g128_act_order", "int4_g128", "int4_g128_by_fp8"),
    *("nvfp4_by_nvfp4", "mxfp4_by_mxfp4", "mxfp6_e3m2_by_mxfp6"),
)
EMULATED = ("nvfp4_by_nvfp4", "mxfp4_by_mxfp4", "mxfp6_e3m2_by_mxfp6")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 2048])
    parser.add_argument("--out")
    args = parser.parse_args()
    header = make_header(DEVICE, measure_ceilings(DEVICE, (torch.bfloat16,)) | eight_bit_rates())
    report = BenchReport(header)
    for shape in args.shapes:
        for name in args.formats:
            with torch.inference_mode():
                cells = [Cell("balanced", "layer", T) for T in args.tokens]
                experts = "triton_emulated" if name in EMULATED else "triton_quantized"
                measure(SHAPES[shape], name, cells, [experts], report)
            gc.collect()
            torch.cuda.empty_cache()
            if args.out:
                report.write(args.out)


if __name__ == "__main__":
    main()
