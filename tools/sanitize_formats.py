"""A layer of every weight format with every way of rounding rows, by all experts that run it on the
GPU that is here: a program for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:tests compute-sanitizer --tool memcheck \
        --report-api-errors no --error-exitcode 1 python tools/sanitize_formats.py
    PYTHONPATH=src:tests compute-sanitizer --tool racecheck --error-exitcode 1 \
        python tools/sanitize_formats.py --every-lane [--formats nf4 mxfp8] [--part 0 8]

The formats are those of ``tests/format_matrix.py``, which a test holds against what selection
knows. Under a tool a layer takes seconds: ``--part`` runs one of several equal parts of the list.
``sanitize.py`` says how several run at once, and what racecheck names in warp-specialised kernels
although nothing is wrong; ``--every-lane`` does what it does in ``sanitize_rows.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from expert_layers import Layer  # type: ignore[import-not-found]
from format_matrix import (  # type: ignore[import-not-found]
    FEATURES,
    LAYER,
    MATRIX,
    case_of,
    serving,
    with_ids_of_no_expert,
)
from fusedmoe.quantization.keys import QuantKey

ON_GPU = {"device": "cuda", "dtype": torch.bfloat16}
LAYERS: tuple[Layer, ...] = (
    replace(LAYER, T=1, **ON_GPU),
    replace(LAYER, T=300, **ON_GPU),  # 150 slots an expert: prefill
    replace(FEATURES, T=33, K=4, E=32, local=9, **ON_GPU),
)


def run(name: str, rows: QuantKey | None, experts: list[str] | None = None) -> None:
    """Weights are packed on the CPU: a tool patches every kernel that it sees."""
    for layer in LAYERS:
        case = case_of(name, rows, layer)
        on_cpu = replace(case, layer=replace(case.layer, device="cpu"))
        tensors = on_cpu.layer.tensors()
        weights = tuple(one.to(layer.device) for one in on_cpu.weights(tensors))
        tensors = {n: None if t is None else t.to(layer.device) for n, t in tensors.items()}
        if layer.T > 3:
            tensors = with_ids_of_no_expert(tensors)
        for cls in serving(on_cpu):
            if experts is None or cls.name in experts:
                case.runner(tensors, cls, weights=weights, prepare=True)()
                torch.cuda.synchronize()
                print(name, rows, cls.name, layer.T, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", help="of the weights, these alone")
    parser.add_argument("--experts", nargs="+", help="these alone, by name")
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("NUMBER", "PARTS"))
    parser.add_argument("--every-lane", action="store_true", help="arrives by itself")
    args = parser.parse_args()
    if args.every_lane:
        from sanitize_rows import let_every_lane_arrive

        let_every_lane_arrive()
    torch.manual_seed(0)
    part, parts = args.part
    chosen = [case for case in MATRIX if args.formats is None or case[0] in args.formats]
    for name, rows in chosen[part::parts]:
        run(name, rows, args.experts)
    print("all kernels ran")


if __name__ == "__main__":
    main()
