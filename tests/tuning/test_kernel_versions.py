"""Tables know the device code they were measured with; a change of it is noticed here."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from fusedmoe.tuning.choice import table_name
from fusedmoe.tuning.table_file import table_from_text
from fusedmoe.tuning.tuned_kernels import TRITON, device_text, source_digest

TABLES = sorted(
    (path for path in files("fusedmoe.tuning").joinpath("tables").rglob("*.json")),
    key=str,
)


def test_a_changed_kernel_is_noticed() -> None:
    """Measure the tables again (``fusedmoe tune``) and raise ``version`` where the change touches
    speed; where it cannot, write the new digest into ``tuned_kernels.py``."""
    assert source_digest(TRITON) == TRITON.digest, test_a_changed_kernel_is_noticed.__doc__


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
    assert path.name == table_name(table.layer)
    assert path.parent.name == f"{table.kernel}-{table.kernel_version}"
    assert path.parent.parent.name == table.device
    assert table.measured
    assert table.text == path.read_text()


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h200" / "tuning.json"


def test_a_layer_without_a_table_loses_little() -> None:
    """As measured; every packaged table is among what was compared."""
    rows = json.loads(RESULTS.read_text())["rows"]
    default = [row for row in rows if row["tiles"] == "default"]
    assert max(row["loss"] for row in default) < 0.1
    sizes = {tuple(row[name] for name in "EkHI") for row in default}
    tables = [table_from_text(path.read_text()).layer for path in TABLES]
    assert {(key.E, key.K, key.H, key.I) for key in tables} == sizes
