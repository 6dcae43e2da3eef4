"""The ``fusedmoe`` command: one module per verb, each with ``add_arguments`` and ``run``.

Bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fusedmoe.cli.output import printable

VERBS = {
    "generate": "generate text from a checkpoint folder or a preset",
    "inspect": "describe the MoE layers of a checkpoint, from its headers alone",
    "explain": "say which implementation runs a layer, and why not the others",
    "bench": "measure a layer against Transformers' experts and the machine's limit",
    "balance": "show how even the load of ranks would be, before and after balancing",
    "tune": "measure which tiles a layer should use, or show what a table chooses",
    "env": "print versions, devices and what this machine can run",
}


class _Parser(argparse.ArgumentParser):
    """argparse without the usage text before an error: the one line says what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)}\n")


def _one_line(message: object) -> str:
    """Without the stack of C++ frames that torch appends to some of its own."""
    words = str(message).partition("Exception raised from ")[0].split()
    return printable(" ".join(words))


def make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for ``words``, with the arguments of their verb; no other verb's module is
    imported.

    Nothing but the verb comes before those: no option of the command itself has a value.
    """
    from fusedmoe import __version__

    chosen = next((word for word in words if word in VERBS), None)

    parser = _Parser(
        prog="fusedmoe", description="Run, explain and measure Mixture-of-Experts layers."
    )
    parser.add_argument("--version", action="version", version=f"fusedmoe {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        if name == chosen:
            import_module(f"fusedmoe.cli.{name}").add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.set_defaults(default_of=verb.get_default)
        verb.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0, 1 where a comparison failed, 2 for bad input and too little memory, 130 when interrupted, 141
    where nobody reads on (``| head``).
    """
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser(words)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        what = _one_line(f"{' '.join(unknown)} (fusedmoe {args.verb} --help lists what there is)")
        parser.exit(2, f"fusedmoe {args.verb}: error: unrecognized arguments: {what}\n")
    try:
        code = int(import_module(f"fusedmoe.cli.{args.verb}").run(args))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered goes nowhere, or Python would complain when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        no_memory = isinstance(error, MemoryError) or _is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        if args.traceback:
            traceback.print_exc()
        what = f"out of memory: {_one_line(error)}" if no_memory else _one_line(error)
        print(f"fusedmoe {args.verb}: error: {what}", file=sys.stderr)
        return 2


def _is_out_of_memory(error: Exception) -> bool:
    """Torch's own class on a GPU; on a CPU its allocator's words."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
