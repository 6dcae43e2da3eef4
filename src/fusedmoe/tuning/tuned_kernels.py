"""The kernel that tuned tables are for, and the version of its device code.

A measured tile is worth something only for the device code it was measured with. The version is a
number raised by hand; beside it stands a digest of the text, so that a test notices a kernel
that changed and asks whether its tables still hold.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, eq=False)
class TunedKernel:
    """What a table must know of one experts implementation.

    ``stages`` are tuned one by one. ``sources`` are the files of the package whose ``triton.jit``
    functions make up ``digest``.
    """

    name: str
    version: int
    stages: tuple[str, ...]
    sources: tuple[str, ...]
    digest: str


TRITON = TunedKernel(
    name="triton",
    version=1,
    stages=("gemm1", "gemm2"),
    sources=(
        "kernels/triton/grouped_gemm.py",
        "kernels/triton/activation.py",
        "kernels/triton/ids.py",
    ),
    digest="48117cfb18843d58",
)


def source_digest(kernel: TunedKernel) -> str:
    """Of the kernel's device functions as they are now; comments, docstrings and spaces are left
    out."""
    whole = hashlib.sha256()
    for source in kernel.sources:
        text = files("fusedmoe").joinpath(source).read_text()
        whole.update(device_text(text).encode())
    return whole.hexdigest()[:16]


def device_text(source: str) -> str:
    """The jit functions of a file, in order, as code alone."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any(
            ".jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            dropped = range(first.lineno, (first.end_lineno or 0) + 1) if documented else range(0)
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines = [
                "" if number in dropped else line
                for number, line in enumerate(source.splitlines(), 1)
                if start <= number <= (node.end_lineno or 0)
            ]
            found.append(_without_comments("\n".join(lines)))
    return "\n".join(found)


def _without_comments(code: str) -> str:
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "".join("".join(lines).split())
