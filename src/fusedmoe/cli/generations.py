"""What ``fusedmoe generate`` has generated: one record for each run, and how they compare."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from fusedmoe.cli.output import print_json, print_table, printable


@dataclass(frozen=True)
class Generation:
    """One run: the new tokens, and their speed after a warm-up (prompt included in the time)."""

    implementation: str
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds


def _first_difference(left: list[int], right: list[int]) -> int | None:
    """Where two token lists part; None where they are the same."""
    if left == right:
        return None
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def report(
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
                "route": args.route,
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
