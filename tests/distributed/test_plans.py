"""Models that Transformers has cut by its own plans, tensor- and expert-parallel, on two ranks."""

from __future__ import annotations

import pytest
import rank_plans

pytest.importorskip("transformers")


@pytest.mark.parametrize("expert_parallel", [True, False])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_their_experts_run_here_as_they_are_cut(ranks, family, expert_parallel):
    ranks.run(rank_plans.check, family, expert_parallel)
