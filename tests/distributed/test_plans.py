"""Models that Transformers has cut by its own plans, tensor- and expert-parallel, on two ranks."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import rank_plans

pytest.importorskip("transformers")

# How rows reach the experts of other ranks, of which newer releases of Transformers have several.
WAYS = ["auto", "all_to_all"] if find_spec("transformers.distributed.expert_parallel") else [""]


@pytest.mark.parametrize(("expert_parallel", "way"), [*((True, way) for way in WAYS), (False, "")])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_their_experts_run_here_as_they_are_cut(ranks, family, expert_parallel, way):
    ranks.run(rank_plans.check, family, expert_parallel, way)
