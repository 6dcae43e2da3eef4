"""Transformers' own plans of cutting a model over ranks, with its experts run here. In a RankPool.

The plan is put on a model that is whole in memory: reading one in parts takes Transformers'
loader, which wants the package accelerate.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from rank_models import prompt
from torch.distributed.device_mesh import init_device_mesh

import fusedmoe
from fusedmoe.integrations.transformers import experts_function


def model_of(family: str) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_local_experts=8,
        num_experts_per_tok=3,
        max_position_embeddings=64,
    )
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return made


def cut(model: Any, expert_parallel: bool, way: str) -> Any:
    """``model`` over two ranks, as its config plans it; ``way`` is how rows reach its experts."""
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig
    from transformers.distributed.sharding_utils import DtensorShardOperation
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("apart", "tp"))["tp"]
    whole = {name: one.detach().clone() for name, one in model.named_parameters()}
    if find_spec("transformers.distributed.expert_parallel") is None:
        model.config.distributed_config = DistributedConfig(
            tp_size=2, tp_plan="auto", enable_expert_parallel=expert_parallel
        )
        model._device_mesh, model._tp_size = mesh, 2
        apply_tensor_parallelism(model, mesh)
    else:
        from transformers.distributed.expert_parallel import apply_expert_parallelism

        sizes = {"ep_size": 2, "ep_implementation": way} if expert_parallel else {}
        config = DistributedConfig(tp_size=2, tp_plan="auto", **sizes)
        tp_plan, ep_plan, _ = model._resolve_parallel_plans(config)
        apply_tensor_parallelism(model, mesh, tp_plan)
        apply_expert_parallelism(model, mesh, mesh, ep_plan, way)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            part = DtensorShardOperation(parameter).shard_tensor(whole[name])
            parameter.to_local().copy_(part)
    return model


def check(family: str, expert_parallel: bool, way: str) -> None:
    """Logits of the model in one piece, its experts run by Transformers and by this library."""
    ids = prompt(0, 2, 7)
    expected = model_of(family)(ids).logits
    apart = cut(model_of(family), expert_parallel, way)
    torch.testing.assert_close(apart(ids).logits, expected, rtol=1e-4, atol=1e-4)
    fusedmoe.register()
    apart.set_experts_implementation("fusedmoe")
    run, shapes = experts_function.run_experts, []

    def counted(*arguments: Any) -> torch.Tensor:
        shapes.append(tuple(arguments[1].w13.shape))
        return run(*arguments)

    with mock.patch.object(experts_function, "run_experts", counted):
        found = apart(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # In tensor parallelism, GPT-OSS's experts are in no plan.
    halves = not expert_parallel and family != "GptOss"
    assert [shape[0] for shape in shapes] == [4 if expert_parallel else 8] * 2
    assert (16 if halves else 32) in shapes[0][1:]
