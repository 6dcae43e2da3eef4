"""Speed of the Hopper kernels, each by itself, on one GPU, with the ceilings of the same run.

    python benchmarks/hopper_kernels.py time [--shapes qwen3 mixtral] [--tokens 1 8 64] [--out F]

Timing: CUDA-graph replay, experts scope (ids given), balanced routing; every call of a graph uses
other experts or another weight set, so that weights come from memory. Microseconds per call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl

from fusedmoe.activation import MoEActivation
from fusedmoe.bench.report import least_us
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.kernels.hopper_decode import hopper_decode
from fusedmoe.kernels.hopper_direct import hopper_direct
from fusedmoe.kernels.hopper_prefill import hopper_prefill, prefill_rows
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.routing import routing
from fusedmoe.router.spec import RoutingSpec, RoutingTensors
from fusedmoe.tuning.hopper_tiles import (
    DecodeTiles,
    DirectTiles,
    PrefillTiles,
    decode_tiles,
    decode_tiles_of,
    direct_tiles,
)

Tiles = DecodeTiles | PrefillTiles | DirectTiles
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Shape:
    name: str
    E: int
    k: int
    H: int
    I: int  # noqa: E741
    activation: MoEActivation = MoEActivation.SILU
    bias: bool = False


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3", 128, 8, 2048, 768),
        Shape("qwen3.6", 256, 8, 2048, 512),
        Shape("mixtral", 8, 2, 4096, 14336),
        Shape("gpt-oss", 128, 4, 2880, 2880, MoEActivation.SWIGLUOAI, True),
        Shape("olmoe", 64, 8, 2048, 1024),
        Shape("scout", 16, 1, 5120, 8192),
    )
}


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    return out.normal_(std=scale)


def balanced_ids(T: int, E: int, k: int, offset: int = 0) -> torch.Tensor:
    """Every expert equally often, the picks of a token distinct."""
    flat = (torch.arange(T * k, device=DEVICE) + offset) % E
    return flat.view(T, k).to(torch.int32).contiguous()


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph that makes all ``calls`` in a row."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def graph_times(
    variants: Mapping[str, Sequence[Callable[[], object]]],
    rounds: int = 25,
    warm_ms: float = 60.0,
    pause: float = 0.0,
) -> dict[str, tuple[float, float, float]]:
    """(median, p10, p90) microseconds per call, the variants replayed in turns, with a rest of
    ``pause`` times its length after each replay."""
    graphs = {name: graph_of(calls) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin = time.time()
    while time.time() - begin < warm_ms / 1e3:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / len(variants[name]))
            time.sleep(pause * start.elapsed_time(end) / 1e3)
    out = {}
    for name, values in times.items():
        values.sort()
        tail = len(values) // 10
        out[name] = (statistics.median(values), values[tail], values[-1 - tail])
    return out


READ_BLOCK = 8192


@triton.jit
def read_kernel(words_ptr, found_ptr, BLOCK: tl.constexpr):
    """The plainest read of memory: one maximum per block."""
    block = tl.program_id(0)
    words = tl.load(words_ptr + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(found_ptr + block, tl.max(words, 0))


def ceilings() -> dict[str, float]:
    """Read and copy GB/s, bf16 TFLOP/s on random data."""
    big = randn(1 << 30)
    size = big.numel() * 2
    copy_to = torch.empty_like(big)
    found = torch.empty(size // 4 // READ_BLOCK, dtype=torch.int32, device=DEVICE)
    words = big.view(torch.int32)
    a, b = randn(8192, 8192), randn(8192, 8192)
    grid = (found.numel(),)
    times = graph_times(
        {
            "read": [lambda: read_kernel[grid](words, found, BLOCK=READ_BLOCK, num_warps=4)],
            "copy": [lambda: copy_to.copy_(big)],
            "mm": [lambda: a @ b] * 4,
        },
        10,
    )
    read, copy, mm = (times[name][0] for name in ("read", "copy", "mm"))
    return {
        "read_gbs": size / read / 1e3,
        "copy_gbs": 2 * size / copy / 1e3,
        "bf16_tflops": 2 * 8192**3 / mm / 1e6,
    }


class Layer:
    """Weights of one layer and scratch for T tokens."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape = shape
        ups = halves(shape) - 1
        E, H, I = shape.E, shape.H, shape.I  # noqa: E741
        self.w1 = randn(E, ups * I, H, scale=H**-0.5, dtype=dtype)
        self.w2 = randn(E, H, I, scale=I**-0.5, dtype=dtype)
        self.b1 = randn(E, ups * I, dtype=dtype) if shape.bias else None
        self.b2 = randn(E, H, dtype=dtype) if shape.bias else None

    def scratch(self, T: int) -> dict[str, torch.Tensor]:
        """Input, output and scratch for every kind of kernel, poisoned."""
        R, E, H, I = T * self.shape.k, self.shape.E, self.shape.H, self.shape.I  # noqa: E741
        like, nan = self.w1, float("nan")
        rows = prefill_rows(R, E)
        return {
            "x": randn(T, H, dtype=like.dtype),
            "topk_weights": torch.rand(T, self.shape.k, device=DEVICE),
            "out": like.new_full((T, H), nan),
            "act": like.new_full((rows, I), nan),
            "y": like.new_full((rows, H), nan),
        }

    def run(
        self,
        ids: torch.Tensor,
        tiles: Tiles,
        programs: int,
        scratch: dict[str, torch.Tensor],
    ) -> None:
        """One layer by the kind of kernel that ``tiles`` belong to."""
        R = ids.numel()
        rows = slice(None) if isinstance(tiles, PrefillTiles) else slice(R)
        layer = LayerTensors(
            scratch["x"],
            self.w1,
            self.w2,
            scratch["topk_weights"],
            ids,
            scratch["out"],
            scratch["act"][rows],
            scratch["y"][rows],
            programs,
            self.shape.activation,
            w1_bias=self.b1,
            w2_bias=self.b2,
        )
        if isinstance(tiles, PrefillTiles):
            hopper_prefill(layer, tiles)
        elif isinstance(tiles, DirectTiles):
            hopper_direct(layer, tiles)
        else:
            hopper_decode(layer, tiles)

    def run_from_logits(
        self,
        logits: torch.Tensor,
        tiles: Tiles,
        programs: int,
        scratch: dict[str, torch.Tensor],
    ) -> None:
        """Routing (softmax, renormalised) and the layer."""
        spec = RoutingSpec(top_k=self.shape.k, num_experts=self.shape.E, renormalize=True)
        result = routing(logits, spec, RoutingTensors())
        weights = scratch | {"topk_weights": result.topk_weights}
        self.run(result.topk_ids, tiles, programs, weights)

    def reference(self, ids: torch.Tensor, scratch: dict[str, torch.Tensor]) -> torch.Tensor:
        return experts_reference(
            scratch["x"].double(),
            self.w1.double(),
            self.w2.double(),
            scratch["topk_weights"],
            ids,
            activation=self.shape.activation,
            w1_bias=self.b1,
            w2_bias=self.b2,
            compute_dtype=torch.float64,
        )


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative Frobenius error; NaN stays NaN."""
    norm = reference.norm().item()
    return (out.double() - reference).norm().item() / (norm or 1.0)


def all_tiles(R: int, shape: Shape, more: bool) -> dict[str, Tiles]:
    """The kinds of kernel that can run R slots, with ``more`` in several tiles each."""
    out: dict[str, Tiles] = {}
    mean = R / shape.E
    T = R // shape.k
    if (T <= 2 or (more and T <= 8)) and R <= 32 and shape.k <= 16:
        out["direct"] = direct = direct_tiles(T, shape.k, shape.H, shape.I)
        if more:
            out["uneven"] = replace(direct, up_rows=64, up_valid=64, up_stages=3)
    if mean <= 96:
        auto = decode_tiles(R, shape.E, shape.H, shape.I)
        out["decode"] = auto
        if more:
            out["narrow"] = decode_tiles_of(auto.block, 64, 128)
            out["wide"] = decode_tiles_of(auto.block, 128, 256)
    if mean >= 16:
        out["prefill"] = PrefillTiles()
        if more:
            out["stages3"] = PrefillTiles(stages=3)
            out["group12"] = PrefillTiles(group=12)
            out["group16"] = PrefillTiles(group=16)
    return out


def warm(shapes: list[str], tokens: list[int], all_variants: bool, part: tuple[int, int]) -> None:
    """Compile one part of what ``time`` will run, on layers of two experts."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    jobs: dict[object, tuple[Shape, int, Tiles]] = {}
    for name, T in itertools.product(shapes, sorted(tokens)):
        shape = SHAPES[name]
        for tiles in all_tiles(T * shape.k, shape, all_variants).values():
            key = (name, tiles, T if isinstance(tiles, DirectTiles) else None)
            jobs.setdefault(key, (shape, T, tiles))
    for shape, T, tiles in list(jobs.values())[part[0] :: part[1]]:
        layer = Layer(replace(shape, E=2))
        ids = balanced_ids(T, 2, shape.k)
        layer.run(ids, tiles, sms, layer.scratch(T))
        torch.cuda.synchronize()


def profile(shapes: list[str], tokens: list[int]) -> None:
    """Two calls per size with the chosen tiles, for a profiler to look at the second."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for name in shapes:
        shape = SHAPES[name]
        layer = Layer(shape)
        for T in tokens:
            scratch = layer.scratch(T)
            for offset in (0, T * shape.k):
                ids = balanced_ids(T, shape.E, shape.k, offset)
                for tiles in all_tiles(T * shape.k, shape, False).values():
                    layer.run(ids, tiles, sms, scratch)
                    torch.cuda.synchronize()


def logits_for(ids: torch.Tensor, E: int) -> torch.Tensor:
    """Router logits [T, E] in bf16 whose best picks are ``ids``."""
    logits = torch.randn(ids.shape[0], E, device=DEVICE)
    return logits.scatter_add_(1, ids.long(), torch.full(ids.shape, 20.0, device=DEVICE)).bfloat16()


MAX_CHECKED_TOKENS = 16
DENSE_FLOPS = 2 * 8192**3


def halves(shape: Shape) -> int:
    """Weight matrices of I x H per expert."""
    return 3 if shape.activation.is_gated else 2


def limit_us(shape: Shape, T: int, peak: dict[str, float]) -> float:
    active = min(shape.E, T * shape.k)
    weights = active * halves(shape) * shape.H * shape.I * 2
    moved = weights + 2 * T * shape.H * 2
    flops = halves(shape) * 2 * T * shape.k * shape.H * shape.I
    return least_us(moved, flops, peak["read_gbs"], peak["bf16_tflops"])


def time_shape(
    shape: Shape,
    tokens: list[int],
    peak: dict[str, float],
    seconds: float,
    all_variants: bool,
    from_logits: bool,
) -> list[dict]:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    copies = 3 if shape.E * shape.H * shape.I * 6 < 8 << 30 else 2
    layers = [Layer(shape) for _ in range(copies)]
    rows = []
    begin = time.time()
    for T in tokens:
        if time.time() - begin > seconds:
            print("out of time")
            break
        R = T * shape.k
        scratch = layers[0].scratch(T)
        sets = 16 if T <= 16 else 2 * copies if T <= 512 else copies
        ids = [balanced_ids(T, shape.E, shape.k, i * R) for i in range(sets)]
        best = limit_us(shape, T, peak)
        want = layers[0].reference(ids[0], scratch) if T <= MAX_CHECKED_TOKENS else None
        kinds = all_tiles(R, shape, all_variants)
        variants: dict[str, list[Callable[[], object]]] = {
            name: [
                partial(layers[i % copies].run, ids[i], tiles, sms, scratch) for i in range(sets)
            ]
            for name, tiles in kinds.items()
        }
        if from_logits:
            logits = [logits_for(chosen, shape.E) for chosen in ids]
            variants = {
                name: [
                    partial(layers[i % copies].run_from_logits, logits[i], tiles, sms, scratch)
                    for i in range(sets)
                ]
                for name, tiles in kinds.items()
            }
        flops = halves(shape) * 2 * R * shape.H * shape.I
        if T >= 2048:
            a, b = randn(8192, 8192), randn(8192, 8192)
            variants["dense"] = [partial(torch.matmul, a, b)] * max(
                1, round(flops * sets / DENSE_FLOPS)
            )
        for name, (us, p10, p90) in graph_times(variants).items():
            if name == "dense":
                print(
                    f"{'dense':14} {DENSE_FLOPS / us / 1e6:6.1f} TF in the same turns", flush=True
                )
                continue
            tiles = kinds[name]
            wrong = None
            if want is not None:
                layers[0].run(ids[0], tiles, sms, scratch)
                wrong = error(scratch["out"], want)
            row = {
                "impl": f"hopper:{name}", "shape": shape.name, "T": T, "us": us,
                "p10_us": p10, "p90_us": p90, "limit_us": best, "fraction_of_limit": best / us,
                "tflops": flops / us / 1e6, "tiles": asdict(tiles), "error": wrong,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{shape.name:8} T={T:5} {name:11} {us:8.1f} us  limit {best:7.1f} "
                f"{100 * best / us:5.1f} %  {row['tflops']:6.1f} TF"
                + ("" if wrong is None else f"  error {wrong:.1e}"),
                flush=True,
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("warm", "time", "profile"))
    parser.add_argument("--shapes", nargs="+", default=["qwen3", "mixtral"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 128])
    parser.add_argument("--seconds", type=float, default=60.0, help="per shape")
    parser.add_argument("--all-variants", action="store_true")
    parser.add_argument("--logits", action="store_true", help="time routing too")
    parser.add_argument("--part", default="0/1", help="i/n: this share of the cases alone")
    parser.add_argument("--out")
    args = parser.parse_args()
    index, parts = (int(number) for number in args.part.split("/"))
    if args.mode == "warm":
        warm(args.shapes, args.tokens, args.all_variants, (index, parts))
        return 0
    if args.mode == "profile":
        profile(args.shapes, args.tokens)
        return 0
    peak = ceilings()
    print({name: round(value) for name, value in peak.items()}, flush=True)
    rows = []
    for name in args.shapes:
        rows += time_shape(
            SHAPES[name], args.tokens, peak, args.seconds, args.all_variants, args.logits
        )
        torch.cuda.empty_cache()
    if args.out:
        with open(args.out, "w") as file:
            json.dump(peak | {"rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
