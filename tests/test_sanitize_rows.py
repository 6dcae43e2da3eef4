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


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("sanitize_rows", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("entry", SOURCES)
def test_every_lane_can_be_made_to_arrive(entry, tool):
    text = source_of(*SOURCES[entry])
    assert [text.count(one) for one, _ in tool.EVERY_LANE[entry]] == [1] * len(
        tool.EVERY_LANE[entry]
    )


def test_sizes_are_of_whole_groups(tool):
    assert tool.of_whole_groups("int4_g32", tool.SIZES) == [*tool.SIZES]
    assert tool.of_whole_groups("int4_g128", tool.SIZES) == [(512, 256)]
    assert tool.of_whole_groups("int4_g128", tool.TOKEN_SIZES) == [(512, 256, 5)]
