"""Layers whose experts are quantized, over four ranks and while experts change places."""

from __future__ import annotations

import pytest
import rank_quantized


@pytest.mark.parametrize("name", rank_quantized.SCHEMES)
def test_the_output_is_that_of_one_rank(ranks, name):
    ranks.run(rank_quantized.check, name)
