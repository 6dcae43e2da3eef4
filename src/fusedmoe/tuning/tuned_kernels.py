"""The kernels that tuned tables are for: their tile records, and the version of their device code.

A measured tile is worth something only for the device code it was measured with. The version is a
number raised by hand; beside it stands a digest of the text, so that a test notices a kernel
that changed and asks whether its tables still hold.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fusedmoe.tuning.hopper_tiles import DecodeTiles, DirectTiles, PrefillTiles
from fusedmoe.tuning.tiles import TileConfig


@dataclass(frozen=True, eq=False)
class TunedKernel:
    """What a table must know of one experts implementation.

    ``stages`` are tuned one by one; ``tile_types`` are the records a tile may be, by the name they
    have in files; tiles of one layer must agree in ``shared(tile)``. ``sources`` are the files of
    the package whose ``triton.jit`` (or ``gluon.jit``) functions make up ``digest``.
    """

    name: str
    version: int
    stages: tuple[str, ...]
    tile_types: Mapping[str, type]
    shared: Callable[[Any], int]
    sources: tuple[str, ...]
    digest: str | None


KERNELS: dict[str, TunedKernel] = {
    kernel.name: kernel
    for kernel in (
        TunedKernel(
            name="triton",
            version=1,
            stages=("gemm1", "gemm2"),
            tile_types={"tile": TileConfig},
            # One alignment serves both GEMMs.
            shared=lambda tile: tile.block_m,
            sources=(
                "kernels/triton/grouped_gemm.py",
                "kernels/triton/activation.py",
                "kernels/triton/ids.py",
            ),
            digest="48117cfb18843d58",
        ),
        # No tables of it are shipped, so nothing has to notice a change.
        TunedKernel(
            name="hopper",
            version=1,
            stages=("layer",),
            tile_types={"direct": DirectTiles, "decode": DecodeTiles, "prefill": PrefillTiles},
            shared=lambda tile: 0,
            sources=(
                "kernels/triton/hopper_direct_common.py",
                "kernels/triton/hopper_direct_up.py",
                "kernels/triton/hopper_direct_down.py",
                "kernels/triton/hopper_decode_up.py",
                "kernels/triton/hopper_decode_down.py",
                "kernels/triton/hopper_decode.py",
                "kernels/triton/hopper_prefill_common.py",
                "kernels/triton/hopper_prefill_up.py",
                "kernels/triton/hopper_prefill_down.py",
                "kernels/triton/hopper_prefill.py",
                "kernels/triton/hopper_common.py",
            ),
            digest=None,
        ),
    )
}


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
