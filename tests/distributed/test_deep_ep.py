"""DeepEP's two modes, over a Buffer with the package's signatures that moves rows itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import rank_deep_ep
import torch

from fusedmoe import MoEOptions, ParallelGroups
from fusedmoe.config import FusedMoEParallelConfig
from fusedmoe.prepare_finalize.deepep_high_throughput import DeepEPHTPrepareAndFinalize
from fusedmoe.prepare_finalize.deepep_low_latency import DeepEPLLPrepareAndFinalize
from test_selection import config


def test_high_throughput_rows_arrive_with_what_belongs_to_them(ranks):
    ranks.run(rank_deep_ep.check_high_throughput)


def test_low_latency_rows_stand_with_their_experts(ranks):
    ranks.run(rank_deep_ep.check_low_latency)


def test_what_cannot_be_sent_is_refused(ranks):
    ranks.run(rank_deep_ep.check_refusals)


def test_buffers_have_the_sizes_that_the_package_recommends(ranks):
    ranks.run(rank_deep_ep.check_buffers)


@pytest.mark.parametrize("mode", rank_deep_ep.MODES)
@pytest.mark.parametrize("arguments", [("linear", False), ("round_robin", True)])
def test_the_output_is_that_of_one_rank(ranks, mode, arguments):
    ranks.run(rank_deep_ep.check_layer, mode, *arguments)


@pytest.mark.parametrize("mode", rank_deep_ep.MODES)
@pytest.mark.parametrize("layout", [name for name in rank_deep_ep.LAYOUTS if name != "dp4"])
def test_wherever_tokens_are(ranks, mode, layout):
    ranks.run(rank_deep_ep.check_layer, mode, "linear", False, 0, layout)


def test_copies_of_experts_are_places_of_their_own(ranks):
    ranks.run(rank_deep_ep.check_layer, "high", "linear", False, 4)


@pytest.mark.parametrize("mode", rank_deep_ep.MODES)
def test_rows_go_from_the_wire_into_deep_gemm(ranks, mode):
    ranks.run(rank_deep_ep.check_with_deep_gemm, mode)


class Group:
    """As much of a process group as sizes need."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def reason(cls, buffer=None, parallel=None, **changes):
    parallel = parallel or FusedMoEParallelConfig(1, 1, 2, 2, 0, 0, 0, 0, use_ep=True)
    sizes = {"hidden_dim": 2048, "in_dtype": torch.bfloat16, "max_num_tokens": 8}
    moe = config(moe_parallel_config=parallel, num_local_experts=2, **(sizes | changes))
    groups = ParallelGroups(dp=Group(), enable_expert_parallel=True, deep_ep=buffer)
    return cls.unmet_requirement(moe, groups)


def buffer(low: bool, size: int = 2) -> SimpleNamespace:
    return SimpleNamespace(low_latency_mode=low, group_size=size)


BOTH = (DeepEPHTPrepareAndFinalize, DeepEPLLPrepareAndFinalize)


@pytest.mark.parametrize("cls", BOTH)
def test_reasons_against_either_mode(cls, monkeypatch):
    low = cls.low_latency
    assert reason(cls, buffer(low)) is None
    assert reason(cls) == "needs the module deep_ep, which is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert reason(cls) == "needs a deep_ep.Buffer in ParallelGroups(deep_ep=...)"
    word = "not " if low else ""
    assert reason(cls, buffer(not low)) == f"the deep_ep.Buffer is {word}made for low latency"
    assert "buffer of 8 ranks, the layer has 2" in reason(cls, buffer(low, 8))
    assert "bfloat16, not torch.float16" in reason(cls, buffer(low), in_dtype=torch.float16)
    assert "multiple of 512 bytes, hidden_dim is 72" in reason(cls, buffer(low), hidden_dim=72)
    whole = FusedMoEParallelConfig(2, 1, 2, 1, 0, 0, 0, 0, use_ep=False)
    assert "each expert is cut" in reason(cls, buffer(low), whole)
    assert "no process groups" in cls.unmet_requirement(config(), None)


def test_reasons_against_low_latency_alone():
    cls = DeepEPLLPrepareAndFinalize
    assert "not 1024" in reason(cls, buffer(True), hidden_dim=1024)
    assert "needs max_num_tokens" in reason(cls, buffer(True), max_num_tokens=None)
    assert reason(DeepEPHTPrepareAndFinalize, buffer(False), max_num_tokens=None) is None


def test_names_are_known_to_options():
    from fusedmoe.selection import check_forced_names

    for cls in BOTH:
        check_forced_names(MoEOptions(prepare_finalize=cls.name))
        assert replace(MoEOptions(), prepare_finalize=cls.name).prepare_finalize == cls.name
