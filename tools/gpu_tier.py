"""The GPU tier by several processes on each GPU.

    PYTHONPATH=src python tools/gpu_tier.py [--processes 6] [--seconds 150] [tests/gpu ...]

What it does not know itself goes to pytest. A process takes runs of neighbouring tests, which
compile the same kernels. Failed tests are printed as they come, so that a tier that is cut by its
time has named them; the exit code is 1 if there are any, or if a process ran no test to its end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

SHARE, REPORT = "GPU_TIER_SHARE", "GPU_TIER_REPORT"
NEIGHBOURS = 16


def share_of(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """The ``index``-th of ``count`` shares, of runs of NEIGHBOURS in turns."""
    return [item for i, item in enumerate(items) if i // NEIGHBOURS % count == index]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    index, _, count = os.environ[SHARE].partition("/")
    items[:] = share_of(items, int(index), int(count))


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and not report.failed:
        return
    with Path(os.environ[REPORT]).open("a") as file:
        print(report.outcome, file=file)
    if report.failed:
        print(f"FAILED {report.nodeid}\n{report.longrepr}", file=sys.stderr, flush=True)


def start(gpu: int, share: str, report: Path, words: Sequence[str]) -> subprocess.Popen[bytes]:
    here = str(Path(__file__).parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "PYTHONPATH": os.pathsep.join(paths),
        SHARE: share,
        REPORT: str(report),
    }
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-m", "gpu", "-q", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=6, help="on each GPU")
    parser.add_argument("--seconds", type=float, help="end it after so long")
    args, words = parser.parse_known_args()
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        parser.error("there is no GPU here")
    begin, count = time.monotonic(), gpus * args.processes
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, str(i)) for i in range(count)]
        running = [
            start(i % gpus, f"{i}/{count}", report, words) for i, report in enumerate(reports)
        ]
        for process in running:
            left = None if args.seconds is None else begin + args.seconds - time.monotonic()
            try:
                process.wait(None if left is None else max(left, 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
        cut = sum(process.wait() < 0 for process in running)
        said = [report.read_text().split() if report.exists() else [] for report in reports]
    outcomes = Counter(outcome for one in said for outcome in one)
    words_of = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    print(f"{words_of or 'no test ran'}; {cut} of {count} processes were cut by the time")
    return int(bool(outcomes["failed"]) or not all(said))


if __name__ == "__main__":
    sys.exit(main())
