"""What tools/sanitize_rows.py changes in kernels stands in their text, once."""

import importlib.util
from pathlib import Path

import pytest

from fusedmoe.kernels.cuda import quantized_rows, quantized_token
from fusedmoe.kernels.cuda.program import source_of

PATH = Path(__file__).parents[1] / "tools" / "sanitize_rows.py"
SOURCES = {
    "quantized_rows": quantized_rows.SOURCES,
    "quantized_token_rows": (*quantized_token.COMMON, *quantized_token.OF_ROWS),
}


@pytest.mark.parametrize("entry", SOURCES)
def test_every_lane_can_be_made_to_arrive(entry):
    spec = importlib.util.spec_from_file_location("sanitize_rows", PATH)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = source_of(*SOURCES[entry])
    assert [text.count(one) for one, _ in tool.EVERY_LANE[entry]] == [1] * len(
        tool.EVERY_LANE[entry]
    )
