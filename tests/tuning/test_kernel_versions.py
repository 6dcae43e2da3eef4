"""Tables know the device code they were measured with; a change of it is noticed here."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import tokenize
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from fusedmoe.tuning.choice import table_name
from fusedmoe.tuning.table_file import table_from_text
from fusedmoe.tuning.tuned_kernels import HOPPER, KERNELS, TunedKernel

DEVICE_CODE = r"fusedmoe\.kernels\.triton"
TABLES = sorted(
    (path for path in files("fusedmoe.tuning").joinpath("tables").rglob("*.json")),
    key=str,
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


@pytest.mark.parametrize("name", KERNELS)
def test_a_changed_kernel_is_noticed(name: str) -> None:
    """Measure the tables again (``fusedmoe tune``) and raise ``version`` where the change touches
    speed; where it cannot, write the new digest into ``tuned_kernels.py``."""
    digest = source_digest(KERNELS[name])
    assert digest == KERNELS[name].digest, test_a_changed_kernel_is_noticed.__doc__


def test_all_device_code_of_the_hopper_experts_counts() -> None:
    """What their launchers import, and what that imports."""
    found: set[str] = set()
    seen: set[str] = set()
    todo = ["hopper_direct", "hopper_decode", "hopper_prefill"]
    while todo:
        source = f"kernels/triton/{todo.pop()}.py"
        if source not in seen:
            seen.add(source)
            text = files("fusedmoe").joinpath(source).read_text()
            todo += re.findall(rf"from {DEVICE_CODE}\.(hopper_\w+|activation) import", text)
            found |= {source} if device_text(text) else set()
    assert found == set(HOPPER.sources)


SOURCE = '''
import triton

@triton.jit
def kernel(a, BLOCK: tl.constexpr):
    """Adds."""
    # why
    x = a  +  1   # how
    return "# kept", x


def launcher():
    return 7
'''


def test_only_device_code_counts() -> None:
    same = SOURCE.replace("Adds.", "Adds one.").replace("# why", "# because").replace("7", "8")
    assert device_text(SOURCE) == device_text(same)
    assert '"# kept"' in device_text(SOURCE).replace("#kept", "# kept")
    assert device_text(SOURCE) != device_text(SOURCE.replace("+  1", "+ 2"))
    assert "launcher" not in device_text(SOURCE)
    assert "@triton.jit" in device_text(SOURCE)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_packaged_tables_are_sound_and_where_they_are_looked_for(path) -> None:
    table = table_from_text(path.read_text())
    assert path.name == table_name(table.layer, table.tuned_kernel)
    assert path.parent.name == f"{table.kernel}-{table.kernel_version}"
    assert path.parent.parent.name == table.device
    assert table.measured
    assert table.text == path.read_text()


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h200"


def losses(name: str) -> list[dict[str, Any]]:
    """What layers without a table lost to their tuned selves."""
    rows = json.loads((RESULTS / name).read_text())["rows"]
    return [row for row in rows if row["tiles"] == "default"]


@pytest.mark.parametrize("name", ["tuning.json", "tuning_hopper.json"])
def test_a_layer_without_a_table_loses_little(name: str) -> None:
    """As measured."""
    assert max(row["loss"] for row in losses(name)) < 0.1


def test_every_packaged_table_is_among_what_was_compared() -> None:
    sizes = {tuple(row[name] for name in "EkHI") for row in losses("tuning.json")}
    tables = [table_from_text(path.read_text()).layer for path in TABLES]
    assert {(key.E, key.K, key.H, key.I) for key in tables} == sizes
