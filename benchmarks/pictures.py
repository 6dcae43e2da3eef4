"""The picture that lies beside a table of measurements."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def draw(record: dict[str, Any], path: Path) -> None:
    """Speed and roofline of the balanced rows, where a shape has several token counts."""
    try:
        from fusedmoe.cli.plot import write_plot

        rows = [
            row
            for row in record["rows"]
            if row["routing"] == "balanced" and row["scope"] in ("layer", "gemms")
        ]
        write_plot(record | {"rows": [row | {"scope": "layer"} for row in rows]}, path)
    except ValueError as error:
        print(f"not drawn: {error}", file=sys.stderr)
