"""The router's linear layer at few tokens, against torch's own products.

    python benchmarks/gate.py [--out benchmarks/results/h200/gate.json]

CUDA-graph replays over so many weights that none of them waits in the L2 cache ("cold"), and over
one ("warm"); fp32 logits of fp32 and of bf16 operands. The limit is that of memory, which warm
weights may pass. Asked: at most 4.5 us for one to sixteen
tokens, and never slower than torch.mm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from small_reports import columns, new_report, timed

from fusedmoe.bench import BenchReport
from fusedmoe.kernels.gate import gate_linear, tier_of
from fusedmoe.testing.tolerances import format_name

SIZES = ((7168, 256), (2048, 128))
TOKENS = (1, 2, 4, 8, 16, 32, 64)
CACHE_BYTES = 160 << 20
MOST_WEIGHTS = 80
ASKED_US, ASKED_TOKENS = 4.5, 16
NOISE = 1.01  # where ours is torch.mm itself, the two differ by as much


def torch_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """fp32 logits by one torch.mm."""
    if x.dtype is torch.float32 or not x.is_cuda:
        return torch.mm(x, weight.t()).float()
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", default=[f"{H}x{E}" for H, E in SIZES])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    device = torch.device(args.device)
    report = new_report(device)
    for size in args.sizes:
        H, E = map(int, size.split("x"))
        for dtype in (torch.float32, torch.bfloat16):
            for T in args.tokens:
                measure(report, T, H, E, dtype, device, args.repeats)
    if args.out:
        report.write(args.out)


def measure(
    report: BenchReport,
    T: int,
    H: int,
    E: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> None:
    """One row per implementation and state of the cache."""
    bytes_each = E * H * dtype.itemsize
    copies = max(2, min(MOST_WEIGHTS, CACHE_BYTES // bytes_each))
    weights = [torch.randn(E, H, device=device).mul_(H**-0.5).to(dtype) for _ in range(copies)]
    x = torch.randn(T, H, device=device).to(dtype)
    exact = x.double() @ weights[0].double().T
    moved = bytes_each + T * (H * dtype.itemsize + E * torch.float32.itemsize)
    limit, name_of = moved / report.header["read_gbs"] / 1e3, format_name(dtype)
    ours = partial(gate_linear, out_dtype=torch.float32)
    invariant = partial(ours, batch_invariant=True)
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "fusedmoe": ours,
        "fusedmoe[batch_invariant]": invariant,
        "torch_mm": torch_logits,
    }
    errors = {
        name: float((call(x, weights[0]).double() - exact).norm() / exact.norm())
        for name, call in calls.items()
    }
    for cache, held in (("cold", weights), ("warm", weights[:1] * 4)):
        variants = {name: [partial(call, x, w) for w in held] for name, call in calls.items()}
        times = timed(variants, 5.0, repeats, device)
        for name, taken in times.items():
            report.rows.append(
                {"impl": name, "shape": f"gate-{H}x{E}", "T": T, "H": H, "E": E}
                | {"format": name_of, "scope": "gate", "cache": cache}
                | {"tier": tier_of(x, weights[0], None, torch.float32)}
                | columns(taken, limit, 2.0 * T * H * E, errors[name])
            )
        us, torch_us = times["fusedmoe"].us, times["torch_mm"].us
        met = us <= NOISE * torch_us and (T > ASKED_TOKENS or us <= ASKED_US)
        print(
            f"{'met   ' if met else 'MISSED'} H {H} E {E} {name_of} T={T:<3} "
            f"{cache}: {us:6.2f} us, torch.mm {torch_us:6.2f} us, invariant "
            f"{times['fusedmoe[batch_invariant]'].us:6.2f} us, error {errors['fusedmoe']:.1e}"
        )


if __name__ == "__main__":
    main()
