"""The records that describe a layer: the documented examples, and refusals with their numbers."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    MoEOptions,
    ParallelGroups,
    ParallelPlace,
    RoutingMethodType,
    shard_size,
)

# (tp, dp, expert parallelism) -> per device {tp, dp, ep} as (size, rank), in rank order: the six
# examples of the API reference; pcp serves as dp does.
EXAMPLES = [
    ((1, 1, False), [((1, 0), (1, 0), (1, 0))]),
    ((2, 1, False), [((2, 0), (1, 0), (1, 0)), ((2, 1), (1, 0), (1, 0))]),
    ((1, 2, False), [((2, 0), (2, 0), (1, 0)), ((2, 1), (2, 1), (1, 0))]),
    (
        (2, 2, False),
        [
            ((4, 0), (2, 0), (1, 0)),
            ((4, 1), (2, 0), (1, 0)),
            ((4, 2), (2, 1), (1, 0)),
            ((4, 3), (2, 1), (1, 0)),
        ],
    ),
    ((2, 1, True), [((1, 0), (1, 0), (2, 0)), ((1, 0), (1, 0), (2, 1))]),
    ((1, 2, True), [((1, 0), (2, 0), (2, 0)), ((1, 0), (2, 1), (2, 1))]),
    (
        (2, 2, True),
        [
            ((1, 0), (2, 0), (4, 0)),
            ((1, 0), (2, 0), (4, 1)),
            ((1, 0), (2, 1), (4, 2)),
            ((1, 0), (2, 1), (4, 3)),
        ],
    ),
]


def settings(enable: bool, tp_rank: int = 0, dp_rank: int = 0, pcp_rank: int = 0):
    return SimpleNamespace(
        enable_expert_parallel=enable,
        tp_rank=tp_rank,
        data_parallel_rank=dp_rank,
        pcp_rank=pcp_rank,
    )


@pytest.mark.parametrize("as_pcp", [False, True])
@pytest.mark.parametrize(("sizes", "devices"), EXAMPLES)
def test_the_documented_examples(sizes, devices, as_pcp):
    tp, dp, ep = sizes
    for device, (tp_expected, dp_expected, ep_expected) in enumerate(devices):
        dp_rank, tp_rank = divmod(device, tp)
        if as_pcp:
            config = FusedMoEParallelConfig.make(
                tp, dp, 1, 1, settings(ep, tp_rank, pcp_rank=dp_rank)
            )
            assert (config.pcp_size, config.pcp_rank) == dp_expected
        else:
            config = FusedMoEParallelConfig.make(tp, 1, dp, 1, settings(ep, tp_rank, dp_rank))
            assert (config.dp_size, config.dp_rank) == dp_expected
        assert (config.tp_size, config.tp_rank) == tp_expected
        assert (config.ep_size, config.ep_rank) == ep_expected
        assert config.use_ep == (ep and tp * dp > 1)
        assert config.use_all2all_kernels == (ep and dp > 1)


def test_only_enable_expert_parallel_is_required_of_the_settings():
    config = FusedMoEParallelConfig.make(2, 1, 1, 1, SimpleNamespace(enable_expert_parallel=True))
    assert (config.ep_size, config.ep_rank) == (2, 0)


def test_all_three_sizes_multiply_in_dp_pcp_tp_order():
    config = FusedMoEParallelConfig.make(2, 3, 4, 1, settings(True, 1, 1, 2))
    assert (config.ep_size, config.ep_rank) == (24, (1 * 3 + 2) * 2 + 1)


def test_sequence_parallel_ranks_exchange_tokens():
    config = FusedMoEParallelConfig.make(2, 1, 1, 2, settings(True))
    assert config.is_sequence_parallel
    assert config.use_all2all_kernels


def test_no_parallel_is_one_of_everything():
    config = FusedMoEParallelConfig.make_no_parallel()
    assert (config.tp_size, config.dp_size, config.pcp_size, config.ep_size) == (1, 1, 1, 1)
    assert not config.use_ep
    assert not config.is_sequence_parallel
    with pytest.raises(FrozenInstanceError):
        config.tp_size = 2


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        FusedMoEParallelConfig.make(*sizes, settings(False))


def test_a_rank_outside_its_group_is_refused():
    with pytest.raises(ValueError, match=r"tp_rank 2 .* tp_size 2"):
        FusedMoEParallelConfig(2, 1, 1, 1, 2, 0, 0, 0)


class Group:
    """As much of a process group as a place reads."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class Mesh:
    """As much of a DeviceMesh."""

    def __init__(self, group: Group | int, ndim: int = 1) -> None:
        self._group, self.ndim = group, ndim

    def get_group(self) -> Group | int:
        return self._group


NOTHING = {"tp": None, "dp": None, "pcp": None}


@pytest.mark.parametrize("wrap", [lambda group: group, Mesh])
def test_sizes_come_from_the_groups_and_are_one_without(wrap):
    place = ParallelPlace.of(ParallelGroups(tp=wrap(Group(4, 3))), NOTHING, NOTHING)
    assert (place.tp_size, place.tp_rank) == (4, 3)
    assert (place.dp_size, place.dp_rank, place.pcp_size, place.pcp_rank) == (1, 0, 1, 0)


def test_sizes_without_a_group_are_taken_as_given():
    place = ParallelPlace.of(ParallelGroups(), NOTHING | {"tp": 4}, NOTHING | {"tp": 2})
    assert (place.tp_size, place.tp_rank) == (4, 2)


@pytest.mark.parametrize(("size", "rank"), [(2, None), (None, 1), (4, 0)])
def test_a_size_or_rank_that_contradicts_its_group_is_refused(size, rank):
    with pytest.raises(ValueError, match="size 4, rank 3"):
        ParallelPlace.of(
            ParallelGroups(tp=Group(4, 3)), NOTHING | {"tp": size}, NOTHING | {"tp": rank}
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("world", "'world' is no process group"),
        (-100, "-100 is no process group that this process belongs to"),  # what new_group gives it
        (Mesh(-100), "-100 is no process group"),
        (Mesh(Group(4, 3), 2), "DeviceMesh of 2 dimensions"),
    ],
)
def test_what_is_no_group_of_this_process_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ParallelPlace.of(ParallelGroups(dp=given), NOTHING, NOTHING)


@pytest.mark.parametrize(("size", "ranks", "each"), [(12, 3, 4), (13, 3, 5), (2, 5, 1)])
def test_shard_size_rounds_up(size, ranks, each):
    assert shard_size(size, ranks) == each


def moe_config(**changes) -> FusedMoEConfig:
    return FusedMoEConfig(
        **{
            "num_experts": 8,
            "experts_per_token": 2,
            "hidden_dim": 16,
            "intermediate_size_per_partition": 24,
            "num_local_experts": 8,
            "activation": MoEActivation.SILU,
            "in_dtype": torch.float32,
            "device": torch.device("cpu"),
        }
        | changes
    )


def test_sizes_not_said_are_those_said():
    config = moe_config()
    assert config.num_logical_experts == 8
    assert config.hidden_dim_unpadded == 16
    assert config.w13_num_shards == 2
    assert moe_config(activation=MoEActivation.RELU2_NO_MUL).w13_num_shards == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"experts_per_token": 9}, "experts_per_token 9"),
        ({"experts_per_token": 0}, "experts_per_token 0"),
        ({"num_local_experts": 9}, "num_local_experts 9"),
        ({"num_local_experts": -1}, r"num_local_experts -1 does not lie in \[0, num_experts 8\]"),
        ({"apply_router_weight_on_input": True}, "top-1"),
    ],
)
def test_impossible_layers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_config(**changes)


def test_zero_experts_count_among_the_candidates():
    assert moe_config(experts_per_token=9, num_zero_experts=1).experts_per_token == 9


def test_options_are_checked():
    with pytest.raises(ValueError, match="-1"):
        MoEOptions(max_workspace_bytes=-1)


def test_routing_methods_have_the_reference_numbers():
    assert RoutingMethodType.DeepSeekV3 == 2
    assert RoutingMethodType.MiniMax2 == 7
    assert RoutingMethodType.Custom == 101
