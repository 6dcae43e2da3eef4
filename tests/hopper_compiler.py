"""Kernels compiled for a GPU (Hopper, unless said) on any machine, as a launch would have them.

Triton's interpreter, which the tests run kernels under, stands in the way: programs that compile
run in a process of their own (``run_program``), and end by printing "compiled".
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedmoe.kernels.releases import is_known, known

TESTS = Path(__file__).parent
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Of shared memory that one program may have, by compute capability."""

_TYPES = {
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
}


def run_program(program: str | Path, *arguments: str, gluon: bool = True) -> None:
    """Run Python text, or a file of it, that compiles; ``gluon`` is for known Tritons alone."""
    triton = pytest.importorskip("triton")
    if gluon and not is_known(triton.__version__):
        pytest.skip(f"written for the Gluon of Triton {known()}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{TESTS.parent / 'src'}:{TESTS}"
    words = [str(program)] if isinstance(program, Path) else ["-c", program]
    done = subprocess.run(
        [sys.executable, *words, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]


def build(source: Any, capability: int = 90, **options: Any) -> Any:
    """The compiled kernel. AssertionError where it takes more shared memory than there is."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES[capability], compiled.metadata.shared
    return compiled


def compile_as_launched(
    kernel: Any,
    check: Callable[[Any], None],
    *,
    gluon: bool = True,
    ones: bool = False,
    capability: int = 90,
    divisible: Callable[[str, int], bool] = lambda name, value: False,
) -> Callable[..., None]:
    """A function to put in the place of a launch: (programs, descriptors, tensors, numbers,
    constants, **options), of which it compiles ``kernel`` and lets ``check`` look at the result.

    ``ones``: integers of 1 are constants. ``divisible``: which others are known to be multiples
    of 16. ``capability``: of the GPU, 90 for 9.0.
    """
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    def launch(
        programs: object,
        descriptors: Sequence[Any],
        tensors: Sequence[Any],
        numbers: Sequence[Any],
        constants: Sequence[Any],
        **options: Any,
    ) -> None:
        signature: dict[str, str] = {}
        values: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], Any] = {}
        names = iter(enumerate(kernel.arg_names))
        for value in (*descriptors, *tensors, *numbers):
            index, name = next(names)
            whole = isinstance(value, int)
            if value is None or (ones and whole and value == 1):
                signature[name], values[(index,)] = "constexpr", value
            elif whole or isinstance(value, float):
                signature[name] = "i32" if whole else "fp32"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
            else:
                kind, shape = _TYPES[value.base.dtype], list(value.block_shape)
                signature[name] = f"tensordesc<{kind}{shape},{value.layout!r}>"
            if isinstance(value, torch.Tensor) or (whole and divisible(name, value)):
                attributes[(index,)] = [["tt.divisibility", 16]]
        for value in constants:
            index, name = next(names)
            signature[name], values[(index,)] = "constexpr", value
        assert next(names, None) is None
        source = (GluonASTSource if gluon else ASTSource)(kernel, signature, values, attributes)
        check(build(source, capability, launch_pdl=capability >= 90, **options))

    return launch


def stack_bytes(compiled: Any) -> int:
    """What each thread keeps in memory because registers do not hold it."""
    return int(re.search(r"STACK:(\d+)", cuobjdump(compiled, "-res-usage"))[1])  # type: ignore[index]


def barriers_reused(compiled: Any) -> set[int]:
    """Places of shared memory that are barriers and plain memory both, as far as PTX has them as
    constants: where nobody uses a barrier any more, its memory may be given to something else."""
    ptx = compiled.asm["ptx"]
    places = dict(re.findall(r"add\.s32 \s*(%r\d+), %r\d+, (\d+);", ptx))
    opened = re.findall(r"mbarrier\.init\S* \[(%r\d+)\]", ptx)
    plain = re.findall(r"(?:ld|st)\.shared\S* [^;]*global_smem\+(\d+)\]", ptx)
    assert opened
    assert plain
    return {int(places[one]) for one in opened if one in places} & {int(one) for one in plain}


def cuobjdump(compiled: Any, option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    import triton

    return _told(compiled.asm["cubin"], [triton.knobs.nvidia.cuobjdump.path, option])


def ptxas(compiled: Any) -> str:
    """What ptxas says while it compiles the kernel's PTX once more."""
    from triton.backends.nvidia.compiler import get_ptxas

    words = [get_ptxas(90).path, "--gpu-name=sm_90a", "-v", "-o", "/dev/null"]
    return _told(compiled.asm["ptx"].encode(), words)


def _told(content: bytes, words: list[str]) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*words, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
