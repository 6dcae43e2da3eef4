"""``quantized_rows.cu``, ``quantized_token_rows.cu`` and ``quantized_token.cu`` on small problems,
in all their forms: a program for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src compute-sanitizer --tool memcheck \
        --report-api-errors no --error-exitcode 1 python tools/sanitize_rows.py
    PYTHONPATH=src compute-sanitizer --tool racecheck --error-exitcode 1 \
        python tools/sanitize_rows.py --every-lane [--only token] [--formats mxfp4]

In kernels whose warps share a ring one lane arrives at a barrier for its warp, behind a __syncwarp;
racecheck follows arrivals of the thread itself alone. With ``--every-lane`` all of them arrive, and
no warp reads beyond its rows, where it multiplies by zero whatever a copy is bringing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.align import LoneSlots
from fusedmoe.kernels.cuda import quantized_launch
from fusedmoe.kernels.cuda.program import CudaKernel, source_of
from fusedmoe.kernels.cuda.quantized_token import run_token
from fusedmoe.kernels.hopper_quantized import quantized_decode, token_cut_for
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import MAX_LONE_SLOTS, CudaDecodeTiles, CudaRowsTile

Sizes = TypeVar("Sizes", bound=tuple[int, ...])
E, K, PROGRAMS = 6, 3, 5
# H, I: warps along the rows of both GEMMs.
SIZES = {(512, 256): (4, 4), (320, 192): (5, 3)}
TOKEN_K = 3
# H, I, programs of one token's layer: rows of whole octets; and of others, whose last warp reads
# beyond them.
TOKEN_SIZES = ((512, 256, 5), (576, 320, 4))
ROWS = (
    ("__syncwarp();\n      if (mt == MT - 1 && p.lane == 0) arrive(", "if (mt == MT - 1) arrive("),
    ("empty_at(threadIdx.x), WARPS)", "empty_at(threadIdx.x), WARPS * 32)"),
    ("__syncwarp();\n    if (p.lane == 0) arrive(full_at", "arrive(full_at"),
    ("__syncwarp();\n    if (p.lane == 0) arrive(empty_at", "arrive(empty_at"),
    (
        "begin_barrier(parts + threadIdx.x * 8, KW)",
        "begin_barrier(parts + threadIdx.x * 8, KW * 32)",
    ),
    ("(2 * WM + threadIdx.x) * 8, 1)", "(2 * WM + threadIdx.x) * 8, 32)"),
)
TOKEN_ROWS = (
    ("__syncwarp();\n    if ((threadIdx.x & 31) == 0) arrive(", "arrive("),
    ("begin_barrier(empty(threadIdx.x), WARPS)", "begin_barrier(empty(threadIdx.x), WARPS * 32)"),
    (
        "ldmatrix(w, own + c * 16)",
        "ldmatrix(w, place + (lane & 15) * BYTES +"
        " min((lane >> 4) * 16 + warp * OCTET_BYTES + c * 16, BYTES - 16))",
    ),
)
EVERY_LANE = {"quantized_rows": ROWS, "quantized_token_rows": TOKEN_ROWS}


@lru_cache
def _kernel(
    sources: tuple[str, ...],
    defines: tuple[tuple[str, int], ...],
    threads: int,
    shared: int,
    cooperative: bool,
) -> CudaKernel:
    text, entry = source_of("instructions.cuh", *sources), sources[-1].removesuffix(".cu")
    for one, every in EVERY_LANE.get(entry, ()):
        if text.count(one) != 1:
            raise RuntimeError(f"the source has {one!r} {text.count(one)} times")
        text = text.replace(one, every)
    given = tuple((name, str(value)) for name, value in defines)
    return CudaKernel(text, entry, given, threads, shared, cooperative=cooperative)


def let_every_lane_arrive() -> None:
    """In all kernels that this process launches from now on."""
    quantized_launch._kernel = _kernel


def weight(name: str, shards: int, *shape: int) -> QuantizedTensor:
    values = torch.randn(shape, device="cuda") / 16
    return quantize(values, format_named(name), shards=shards, interleaved=shards == 2)


def of_whole_groups(name: str, sizes: Iterable[Sizes]) -> list[Sizes]:
    """Those of ``sizes`` whose H and I are in groups of a format."""
    group = format_named(name).group.col
    return [one for one in sizes if not any(columns % group for columns in one[:2])]


def tiles_of(H: int, along: tuple[int, int]) -> list[CudaDecodeTiles]:
    def pair(slots: int, *cuts: tuple[int, ...]) -> CudaDecodeTiles:
        first, second = (replace(CudaRowsTile(*cut), slots=slots) for cut in cuts)
        return CudaDecodeTiles(first, second)

    found = []
    for slots in (8, 16, 1):
        first, second = along
        found.append(pair(slots, (1, first, 2, 3, 1), (1, second, 2, 3, 1)))
        if H == 512:  # two tiles for each warp, few steps ahead, one warp along a row
            found.append(pair(slots, (1, 8, 2, 3, 1, 2), (2, 2, 2, 3, 1, 1)))
            found.append(pair(slots, (2, 4, 2, 3, 1, 2), (1, 1, 4, 3, 1, 2)))
    return found


def run(name: str, H: int, width: int, along: tuple[int, int]) -> None:
    w1, w2 = weight(name, 2, E, 2 * width, H), weight(name, 1, E, H, width)
    biases = torch.randn(E, 2 * width, device="cuda"), torch.randn(E, H, device="cuda")
    for T in (5, 24):
        x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
        ids = torch.randint(-1, E + 1, (T, K), device="cuda", dtype=torch.int32)
        picked, R = torch.rand(T, K, device="cuda"), T * K
        act = torch.empty(R, width, device="cuda", dtype=torch.bfloat16)
        y, out = torch.empty(R, H, device="cuda"), torch.empty_like(x)
        act_of = MoEActivation.SWIGLUOAI
        given = x, w1, w2, picked, ids, out, act, y, PROGRAMS, act_of, None, *biases
        for tiles in tiles_of(H, along):
            if tiles.slots == 1 and R > MAX_LONE_SLOTS:
                continue
            blocks = LoneSlots(ids.flatten()) if tiles.slots == 1 else None
            quantized_decode(LayerTensors(*given), blocks, tiles)
            torch.cuda.synchronize()
    print(name, H, width, flush=True)


def run_one_token(name: str, H: int, width: int, programs: int) -> None:
    """``quantized_token_rows.cu`` (mxfp4) or ``quantized_token.cu`` (int4), wherever one runs."""
    w1, w2 = weight(name, 2, E, 2 * width, H), weight(name, 1, E, H, width)
    biases = torch.randn(E, 2 * width, device="cuda"), torch.randn(E, H, device="cuda")
    x = torch.randn(1, H, device="cuda", dtype=torch.bfloat16)
    act = torch.empty(TOKEN_K, width, device="cuda", dtype=torch.bfloat16)
    y, out = torch.empty(TOKEN_K, H, device="cuda"), torch.empty_like(x)
    picked, act_of = torch.rand(1, TOKEN_K, device="cuda"), MoEActivation.SWIGLUOAI
    for picks in ((4, 0, 3), (4, -1, E), (-1, -1, -1)):
        ids = torch.tensor([picks], device="cuda", dtype=torch.int32)
        given = x, w1, w2, picked, ids, out, act, y, programs, act_of, None, *biases
        layer = LayerTensors(*given)
        cut = token_cut_for(layer, where_faster=False)
        if cut is None:
            raise RuntimeError(f"no launch of its own runs a token of {name} {H} {width}")
        run_token(layer, cut)
        torch.cuda.synchronize()
        print("token", name, H, width, picks, f"{cut.stages} of {cut.steps} steps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=("int4_g32", "int4_g128", "mxfp4"))
    parser.add_argument("--every-lane", action="store_true", help="arrives by itself")
    parser.add_argument("--only", choices=("rows", "token"), help="these kernels alone")
    args = parser.parse_args()
    if args.every_lane:
        let_every_lane_arrive()
    torch.manual_seed(0)
    for name in args.formats:
        for sizes in of_whole_groups(name, SIZES) if args.only != "token" else ():
            run(name, *sizes, SIZES[sizes])
        for H, width, programs in of_whole_groups(name, TOKEN_SIZES) if args.only != "rows" else ():
            run_one_token(name, H, width, programs)
    print("all kernels ran")


if __name__ == "__main__":
    main()
