"""``fusedmoe generate``: text from a checkpoint folder, its experts run by this library."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fusedmoe.cli.arguments import add_device, add_dtype, refuse_unused
from fusedmoe.cli.models import (
    PROMPT,
    check_model,
    check_transformers,
    greedy,
    load_tokenizer,
    load_whole,
    prompt_tokens,
    quiet_transformers,
    with_fusedmoe,
)
from fusedmoe.cli.output import Progress, print_json, print_table, printable, progress, steps
from fusedmoe.cli.ranks import Ranks, check_launched, is_first_rank, launched_ranks
from fusedmoe.presets import PRESETS, find_preset, write_preset
from fusedmoe.words import device_named, dtype_named

WARM_UP_TOKENS = 2
PEERS = ("eager", "grouped_mm")


@dataclass(frozen=True)
class Generation:
    """One run: the new tokens, and their speed after a warm-up (prompt included in the time)."""

    implementation: str
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint folder, or a GGUF file")
    parser.add_argument(
        "--preset", metavar="NAME", help=f"write a random checkpoint first: {', '.join(PRESETS)}"
    )
    parser.add_argument(
        "--write-to", metavar="FOLDER", help="keep the preset's checkpoint in this folder"
    )
    parser.add_argument("--large", action="store_true", help="allow a preset that writes gigabytes")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    add_dtype(parser)
    add_device(parser)
    parser.add_argument(
        "--route",
        choices=("experts", "accelerate"),
        default="experts",
        help="replace the experts alone, or whole MoE blocks",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also run Transformers' eager and grouped_mm; exit code 1 if tokens differ from eager",
    )
    parser.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="round experts stored as floats while they are read: fp8, int8, int4_g128, mxfp4, ...",
    )
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument(
        "--ep",
        action="store_true",
        help="spread the experts over the processes of torchrun (route accelerate), each of which "
        "reads its own alone; with --compare, ordinary floats are read whole",
    )
    ranks.add_argument(
        "--tp",
        action="store_true",
        help="cut the model over the processes of torchrun, by Transformers' own plan",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the preset's random weights")


def run(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.preset is None):
        raise ValueError("give either a checkpoint folder or --preset NAME")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    dtype, device = dtype_named(args.dtype), device_named(args.device)
    check_transformers("generate")
    if args.ep or args.tp:
        check_launched("--ep" if args.ep else "--tp")
    if args.preset is None:
        refuse_unused(args, ("write_to", "large", "seed"), "without --preset")
        return _over_ranks(args, Path(args.checkpoint), dtype, device)
    preset = find_preset(args.preset)
    if preset.large and not args.large:
        raise ValueError(f"{args.preset} writes gigabytes; add --large if that is meant")
    quiet_transformers(bars=preset.large)
    with tempfile.TemporaryDirectory(prefix="fusedmoe-") as scratch:
        # Every process has its own, but for the folder that is kept.
        kept = args.write_to if is_first_rank() else None
        folder = write_preset(args.preset, kept or scratch, args.seed)
        return _over_ranks(args, folder, dtype, device)


def _over_ranks(
    args: argparse.Namespace, folder: Path, dtype: torch.dtype | None, device: torch.device
) -> int:
    if not (args.ep or args.tp):
        return _generate(args, folder, dtype, device, None)
    with launched_ranks(device) as ranks:
        return _generate(args, folder, dtype, ranks.device, ranks)


def _generate(
    args: argparse.Namespace,
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    ranks: Ranks | None,
) -> int:
    import fusedmoe

    packed = check_model(folder) or args.quantize is not None
    if packed and args.tp:
        raise ValueError(f"{folder}: packed experts are spread with --ep, not cut with --tp")
    tokenizer = load_tokenizer(folder)
    if packed or (args.ep and not args.compare):
        with steps("reading") as show:
            model = fusedmoe.from_pretrained(
                folder,
                dtype=dtype or "auto",
                device=device,
                quantize=args.quantize,
                ep_group=None if ranks is None else ranks.group,
                same_tokens=True,
                progress=show,
            )
    else:
        model = load_whole(folder, dtype, device, tp=args.tp)
    prompt = prompt_tokens(tokenizer, args.prompt, device)
    runs: list[Generation] = []
    skipped: dict[str, str] = {}
    peers = PEERS if args.compare and not packed else ()
    if args.compare and packed:
        skipped = dict.fromkeys(PEERS, "these experts are packed, which only fusedmoe runs")
    total = (WARM_UP_TOKENS + args.max_new_tokens) * (1 + len(peers))
    with progress(total, "generating") as bar:
        for name in peers:
            try:
                model.set_experts_implementation(name)
            except ValueError as error:
                # A family whose experts are not switchable runs its own loop whatever is asked.
                if name != "eager":
                    skipped[name] = str(error)
                    continue
            runs.append(_timed(model, prompt, args.max_new_tokens, name, bar))
        ours = _timed(
            with_fusedmoe(model, args.route, ranks if args.ep else None),
            *(prompt, args.max_new_tokens, "fusedmoe", bar),
        )
    runs.append(ours)
    return _report(args, tokenizer, runs, skipped)


def _timed(
    model: Any, prompt: torch.Tensor, max_new_tokens: int, name: str, bar: Progress
) -> Generation:
    """Greedy tokens after the prompt [1, T], timed after a short run that warms up."""
    greedy(model, prompt, min(WARM_UP_TOKENS, max_new_tokens), bar)
    start = time.perf_counter()
    tokens = greedy(model, prompt, max_new_tokens, bar)
    return Generation(name, tokens, time.perf_counter() - start)


def _first_difference(left: list[int], right: list[int]) -> int | None:
    """The first index at which two token lists differ; None where they are the same."""
    if left == right:
        return None
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _report(
    args: argparse.Namespace, tokenizer: Any, runs: list[Generation], skipped: dict[str, str]
) -> int:
    """Print what was generated and, for a comparison, how it compares; returns the exit code."""
    text = tokenizer.decode(runs[-1].tokens, skip_special_tokens=True)
    differs: dict[str, int | None] = {}
    if args.compare and len(runs) > 1:
        differs = {r.implementation: _first_difference(runs[0].tokens, r.tokens) for r in runs}
    agree = differs.get("fusedmoe") is None
    if args.json:
        print_json(
            {
                "checkpoint": args.preset or args.checkpoint,
                "route": "accelerate" if args.ep else args.route,
                "prompt": args.prompt,
                "text": text,
                "runs": [asdict(run) | {"tokens_per_s": run.tokens_per_s} for run in runs],
                "first_difference_from_eager": differs,
                "skipped": skipped,
                "tokens_agree": agree if differs else None,
            }
        )
        return 0 if agree else 1
    print(printable(args.prompt + text) + "\n")
    columns = ["experts", "tokens", "tokens/s"]
    rows: list[list[Any]] = [[r.implementation, len(r.tokens), r.tokens_per_s] for r in runs]
    if differs:
        columns.append("against eager")
        for row, where in zip(rows, differs.values(), strict=True):
            row.append("same" if where is None else f"differs at token {where}")
    print_table(columns, rows)
    for name, why in skipped.items():
        print(f"{name} was not run: {why}")
    return 0 if agree else 1
