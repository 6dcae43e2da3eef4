"""Two processes over gloo: the layer's own sums give every rank the whole output."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedmoe import FusedMoE, MoEOptions, ParallelGroups
from layer_oracle import Experts, Rule, routed_oracle

E, K, H, I = 5, 2, 8, 14  # noqa: E741
WORLD = 2


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


def linear(seed: int, width: int = H, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(H, width, bias=bias)


def check_rank(rank: int) -> None:
    """All combinations in one pair of processes: starting them is what takes time."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    experts = Experts.random(E, H, I, bias=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, H, generator=generator)
    logits = torch.randn(6, E + 2, generator=generator)
    correction = torch.rand(E + 2, generator=generator)
    shared, halves = linear(0), [linear(1, bias=False), linear(2, bias=False)]
    for enable_ep, group in ((False, mesh["tp"]), (True, mesh.get_group("tp"))):
        groups = ParallelGroups(tp=group, enable_expert_parallel=enable_ep)

        def build(groups=groups, **arguments):
            layer = FusedMoE(
                E,
                K,
                H,
                I,
                torch.float32,
                has_bias=True,
                parallel=groups,
                options=MoEOptions(experts="torch"),
                **arguments,
            )
            layer.load_weights(experts.named())
            layer.routed_experts.check_loaded()
            return layer

        plain = routed_oracle(x, logits[:, :E], experts, Rule(K))
        close(build()(x, logits[:, :E]), plain)
        close(build(shared_experts=shared)(x, logits[:, :E]), plain + shared(x).double())
        close(
            build(shared_experts=halves[rank], shared_experts_sharded=True)(x, logits[:, :E]),
            plain + sum(half(x).double() for half in halves),
        )
        for bias in (False, True):
            out = linear(3, 11, bias=bias)
            both = build(routed_output_transform=out, shared_experts=linear(4, 11))
            expected = plain @ out.weight.T.double() + linear(4, 11)(x).double()
            close(both(x, logits[:, :E]), expected + (out.bias.double() if bias else 0))
        zero = build(zero_expert_type="identity", e_score_correction_bias=correction)
        rule = Rule(K, bias=correction)
        close(zero(x, logits), routed_oracle(x, logits, experts, rule))
        part = build(reduce_results=False, shared_experts=shared)(x, logits[:, :E]).detach()
        torch.distributed.all_reduce(part, group=mesh.get_group("tp"))
        close(part, plain + shared(x).double())
    compiled = torch.compile(build(shared_experts=shared), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x, logits[:, :E]), plain + shared(x).double())
    check_refusals(mesh)


def check_refusals(mesh) -> None:
    def refused(message: str, **arguments) -> None:
        with pytest.raises(ValueError, match=message):
            FusedMoE(E, K, H, I, torch.float32, **arguments)

    tp = mesh.get_group("tp")
    refused("tp_size 3 .* contradict", parallel=ParallelGroups(tp=tp), tp_size=3)
    refused("ep group has size 2", parallel=ParallelGroups(ep=tp, enable_expert_parallel=True))
    refused("ep group has size 2", parallel=ParallelGroups(tp=tp, ep=tp))
    refused("dp_size 2 has no process group", parallel=ParallelGroups(tp=tp), dp_size=2)
    for way, groups in (
        ("no_ep", {"dp": tp}),
        ("all_to_all", {"dp": tp}),
        ("batched", {"pcp": tp}),
    ):
        options = MoEOptions(prepare_finalize=way)
        refused("nothing moves the tokens", parallel=ParallelGroups(**groups), options=options)


def _process(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    try:
        check_rank(rank)
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_agree_with_the_loop():
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_process, (folder,), nprocs=WORLD)
        except Exception as error:
            reports = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
            raise AssertionError("\n".join(reports)) from error
