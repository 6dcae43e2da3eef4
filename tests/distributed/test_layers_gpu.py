"""Layers over GPUs and NCCL: as over CPUs, in bf16, and in CUDA graphs."""

from __future__ import annotations

import pytest
import rank_eplb
import torch
from rank_layers import Layout, check_layout

from fusedmoe.quantization.keys import FP8_DYNAMIC_128

pytestmark = pytest.mark.multigpu

WORLD = 4 if torch.cuda.device_count() >= 4 else 2
LAYOUTS = {
    "tp": Layout(tp=WORLD),
    "ep": Layout(tp=WORLD, ep=True),
    "dp": Layout(dp=WORLD),
    "dp_ep": Layout(dp=WORLD, ep=True),
    "pcp_ep": Layout(pcp=WORLD, ep=True, spanning=True),
    "sp_ep": Layout(tp=WORLD, ep=True, sp=True),
    "dp_tp_ep": Layout(dp=2, tp=WORLD // 2, ep=True),
}
if WORLD == 4:
    LAYOUTS |= {
        "tp_pairs": Layout(tp=2),
        "ep_pairs": Layout(tp=2, ep=True),
        "dp_pairs_ep": Layout(dp=2, ep=True),
        "pcp_pairs_ep": Layout(pcp=2, ep=True),
        "sp_pairs_ep": Layout(tp=2, ep=True, sp=True),
    }
EXCHANGING = [name for name in LAYOUTS if name.endswith("_ep")]


def on_gpus(pool, layout, mover, **arguments):
    spreads = ("even", "uneven", "one_empty", "all_on_one", "none")
    given = arguments.pop("given", False)
    pool.run(
        run, layout, mover, spreads, given, {"dtype": torch.bfloat16, "tolerance": 5e-2} | arguments
    )


def run(layout, mover, spreads, given, arguments):
    check_layout(layout, mover, spreads, given, "cuda", **arguments)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_chosen_way(gpu_ranks, name):
    on_gpus(gpu_ranks, LAYOUTS[name], way_of(name))


def way_of(name):
    return "naive_dp_ep" if LAYOUTS[name].token_ranks > 1 else ""


@pytest.mark.parametrize(
    ("name", "mover"),
    [(name, way_of(name)) for name, layout in LAYOUTS.items() if layout.ep]
    + [(name, "all_to_all") for name in EXCHANGING],
)
def test_all_tokens_go_to_one_rank(gpu_ranks, name, mover):
    to_one = {"to_one_rank": True, "top_k": 1, "renormalize": False}
    on_gpus(gpu_ranks, LAYOUTS[name], mover, **to_one)


@pytest.mark.parametrize("name", EXCHANGING)
def test_all_to_all(gpu_ranks, name):
    on_gpus(gpu_ranks, LAYOUTS[name], "all_to_all")


@pytest.mark.parametrize("name", ["dp", "dp_ep", "sp_ep"])
def test_in_a_graph_where_the_counts_are_given(gpu_ranks, name):
    on_gpus(gpu_ranks, LAYOUTS[name], "naive_dp_ep", given=True, captured=True)


@pytest.mark.parametrize("use_async", [True, False])
def test_experts_move_while_layers_go_on(gpu_ranks, use_async):
    gpu_ranks.run(rank_eplb.check_balancing, use_async, "cuda", 1e-2)


@pytest.mark.parametrize(
    ("name", "key"), [(None, None), ("fp8_block", FP8_DYNAMIC_128), ("mxfp4", None)]
)
def test_experts_move_beside_captured_graphs(gpu_ranks, name, key):
    gpu_ranks.run(rank_eplb.check_balancing_beside_graphs, name, key)
