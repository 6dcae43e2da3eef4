"""What the verbs share: tables, JSON, progress on stderr, and text made safe for a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

SECONDS_BEFORE_PROGRESS = 2.0


class Progress(Protocol):
    """The part of a progress bar that the verbs use; ``n`` is how much is done."""

    n: float

    def update(self, n: float = 1) -> Any: ...

    def set_description(self, desc: str, refresh: bool = True) -> Any: ...


class _Silent:
    n: float = 0

    def update(self, n: float = 1) -> None:
        self.n += n

    def set_description(self, desc: str, refresh: bool = True) -> None:
        pass


class _Lines(_Silent):
    """Each description as a line on stderr."""

    def __init__(self, total: int | None, what: str) -> None:
        self._total = "" if total is None else f"/{total}"
        self.set_description(what)

    def set_description(self, desc: str, refresh: bool = True) -> None:
        print(f"[{self.n:g}{self._total}] {desc}", file=sys.stderr, flush=True)


@contextmanager
def progress(
    total: int | None, what: str, delay: float = SECONDS_BEFORE_PROGRESS, *, lines: bool = False
) -> Iterator[Progress]:
    """A bar on stderr once the work has taken ``delay`` seconds.

    Without tqdm it is silent, or with ``lines`` a line per description.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield _Lines(total, what) if lines else _Silent()
        return
    with tqdm(total=total, desc=what, delay=delay, file=sys.stderr, leave=False) as bar:
        yield bar


@contextmanager
def steps(
    what: str, delay: float = SECONDS_BEFORE_PROGRESS, *, lines: bool = False
) -> Iterator[Callable[[int, int, str], None]]:
    """As ``progress``, told (done, total, what comes next) before each step."""
    with ExitStack() as stack:
        bars: list[Progress] = []

        def show(done: int, total: int, now: str) -> None:
            text = f"{what}: {now}"
            if not bars:
                bars.append(stack.enter_context(progress(total, text, delay, lines=lines)))
                return
            bars[0].update(done - bars[0].n)
            bars[0].set_description(text, refresh=not delay)

        yield show


def check_writable(*paths: str | None) -> None:
    """Raise ValueError for a file that cannot be written: to be asked before minutes of work."""
    for path in map(Path, filter(None, paths)):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            what = path if path.is_dir() else folder
            kind = "is a folder" if path.is_dir() else "is no folder to write into"
            raise ValueError(f"{path} cannot be written: {what} {kind}")


def print_json(record: Any) -> None:
    """Letters of any script as they are, what a terminal would obey as JSON's escapes."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns padded to their widest cell: numbers to the right, words to the left, all of it made
    ``printable``."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [
        max(len(column), *(len(row[i]) for row in cells), 0) for i, column in enumerate(columns)
    ]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if to_right else value.ljust(width)
            for value, width, to_right in zip(values, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    print(line(columns))
    print(line(["-" * width for width in widths]))
    for row in cells:
        print(line(row))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return printable(str(value))


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.50 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: control characters are written as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
