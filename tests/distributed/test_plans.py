"""Models that Transformers has cut by its own plans, tensor- and expert-parallel, on two ranks."""

from __future__ import annotations

from inspect import signature

import pytest
import rank_plans

pytest.importorskip("transformers")
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

if "tp_plan" in signature(apply_tensor_parallelism).parameters:
    reason = "this release of Transformers cuts models in another way than rank_plans.cut asks for"
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize("expert_parallel", [True, False])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_their_experts_run_here_as_they_are_cut(ranks, family, expert_parallel):
    ranks.run(rank_plans.check, family, expert_parallel)
