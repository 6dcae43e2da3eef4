"""The balancer of a model's layers: count, plan, move, one layer at a time beside the forwards."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.agreement import check_agreement, failures_told
from fusedmoe.distributed.groups import communication_device
from fusedmoe.eplb.executor import ExpertMover, expert_bytes
from fusedmoe.eplb.maps import balancedness, compute_logical_maps, rank_loads
from fusedmoe.eplb.planner import rebalance_experts
from fusedmoe.eplb.transfer import TransferPlan, make_transfer_plan


@dataclass(frozen=True, kw_only=True)
class EPLBConfig:
    """When and how experts are placed anew.

    Every ``step_interval`` steps, from the load of the last ``window_size`` of them. ``use_async``
    plans in another thread for ``planning_steps`` steps and then moves a layer per step; without
    it everything happens within one step. ``num_groups`` of experts stay whole on one of
    ``num_nodes``, where they divide.
    """

    window_size: int = 1000
    step_interval: int = 3000
    use_async: bool = True
    planning_steps: int = 16
    num_groups: int = 1
    num_nodes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.window_size <= self.step_interval or self.planning_steps < 1:
            raise ValueError(
                f"window_size {self.window_size} must lie in [1, step_interval "
                f"{self.step_interval}], planning_steps {self.planning_steps} be at least 1"
            )


class BalancedLayer(Protocol):
    """What the balancer needs of a layer; ``MoERunner`` has it."""

    moe_config: FusedMoEConfig
    routed_experts: Any

    def set_eplb_state(
        self,
        moe_layer_idx: int,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
        *,
        should_record: torch.Tensor | None = None,
    ) -> None: ...


class ExpertBalancer:
    """Keeps the load of ``group``'s ranks even over the layers of one model.

    Call ``step`` once after every forward, on every rank alike. All layers have as many experts
    and are built with ``enable_eplb``; ``group`` is their expert-parallel group, in its order;
    experts travel over ``transfer_group`` (the same ranks; a group of its own lets them travel
    beside the layers' own messages). ``physical_to_logical`` int [L, P] is the placement now, if
    it is not the one layers begin with.

    The maps that routing reads keep their addresses and change between two steps together with
    the weights, so that captured graphs go on.
    """

    def __init__(
        self,
        layers: Sequence[BalancedLayer],
        group: dist.ProcessGroup,
        config: EPLBConfig | None = None,
        *,
        transfer_group: dist.ProcessGroup | None = None,
        physical_to_logical: torch.Tensor | None = None,
    ) -> None:
        self.layers = list(layers)
        self.group = group
        self.config = config or EPLBConfig()
        ranks, what = ParallelGroups(dp=group), "the balancer"
        with failures_told(ranks, what):
            first = _check(self.layers, group)
            L, P, E = len(self.layers), first.num_experts, first.num_logical_experts
            if physical_to_logical is not None and tuple(physical_to_logical.shape) != (L, P):
                raise ValueError(
                    f"physical_to_logical must be {(L, P)}, got {tuple(physical_to_logical.shape)}"
                )
        self.physical_to_logical = (
            (torch.arange(P, device="cpu") % E).repeat(L, 1)
            if physical_to_logical is None
            else physical_to_logical.long().cpu().clone()
        )
        facts = {name: str(value) for name, value in asdict(self.config).items()}
        facts |= {"layers": str(L), "physical_to_logical": str(self.physical_to_logical.tolist())}
        facts["transfer_group"] = str(transfer_group is not None)
        check_agreement(facts, ranks, what)
        device = self.layers[0].routed_experts.w13_weight.device
        self.expert_load = torch.zeros(L, P, dtype=torch.int32, device=device)
        self.logical_to_physical = torch.full(
            (L, E, P - E + 1), -1, dtype=torch.int32, device=device
        )
        self.replica_count = torch.ones(L, E, dtype=torch.int32, device=device)
        self.should_record = torch.zeros(1, dtype=torch.int32, device=device)
        self.mover = ExpertMover(
            transfer_group or group, _expert_bytes(self.layers[0]), P // group.size(), device
        )
        for index, layer in enumerate(self.layers):
            self._write_maps(index)
            layer.set_eplb_state(
                index,
                self.expert_load,
                self.logical_to_physical,
                self.replica_count,
                should_record=self.should_record,
            )
        # The first placement knows nothing of the load, so the first change comes sooner.
        self._steps = self.config.step_interval - self.config.step_interval // 4
        self._planning: Future[torch.Tensor] | None = None
        self._planned_for = 0
        self._targets: torch.Tensor | None = None
        self._next_layer = 0
        self._thread = ThreadPoolExecutor(1, "eplb") if self.config.use_async else None
        self._recording = False
        self._set_recording()

    @property
    def is_rearranging(self) -> bool:
        return self._planning is not None or self._targets is not None

    def step(self) -> None:
        """Call this between two forwards, on every rank and after each forward."""
        if self._targets is not None:
            self._advance()
        elif self._planning is not None:
            self._planned_for += 1
            if self._planned_for >= self.config.planning_steps:
                # Waited for, not asked: ranks would have to agree on when it is ready.
                self._targets, self._planning = self._planning.result(), None
                self._advance()
        else:
            self._steps += 1
            if self._steps >= self.config.step_interval:
                self._begin()
        self._set_recording()

    def rearrange(self) -> None:
        """Place all experts anew at once, from the load counted so far."""
        self.finish()
        self._targets = self._plan(self.logical_load())
        self.finish()

    def finish(self) -> None:
        """Put in place at once what is being planned or on its way; every rank calls it alike.

        Before a balancer is given up, for other ranks say: its messages would meet those of the
        next one over the same group. Also before weights are loaded anew: what is on its way are
        the old ones.
        """
        if self._planning is not None:
            self._targets, self._planning = self._planning.result(), None
        while self._targets is not None:
            self._advance()
        self._set_recording()

    def logical_load(self) -> torch.Tensor:
        """Picks of each logical expert over all ranks since counting began: int64 [L, E], CPU."""
        E = self.replica_count.shape[1]
        mine = torch.zeros(len(self.layers), E, dtype=torch.int64, device="cpu")
        mine.scatter_add_(1, self.physical_to_logical, self.expert_load.cpu().long())
        total = mine.to(communication_device(self.group))
        dist.all_reduce(total, group=self.group)
        return total.cpu()

    def balancedness(self) -> float:
        """Mean over maximal rank load, as ``fusedmoe.eplb.maps.balancedness``; asks all ranks."""
        return balancedness(
            rank_loads(self.logical_load(), self.physical_to_logical, self.group.size())
        )

    def _begin(self) -> None:
        if self._thread is None:
            self.rearrange()
            return
        self._planning = self._thread.submit(self._plan, self.logical_load())
        self._planned_for = 0

    def _plan(self, load: torch.Tensor) -> torch.Tensor:
        return rebalance_experts(
            load,
            self.physical_to_logical.shape[1],
            self.group.size(),
            num_groups=self.config.num_groups,
            num_nodes=self.config.num_nodes,
            previous=self.physical_to_logical,
        )

    def _advance(self) -> None:
        """Put the layer that is on its way in place, and send the next one that changes."""
        assert self._targets is not None
        if self.mover.is_moving:
            self._commit(self._next_layer)
            self._next_layer += 1
        while self._next_layer < len(self.layers):
            plan = self._transfers(self._next_layer)
            if not plan.is_empty:
                self.mover.start(self._rows(self._next_layer), plan)
                self.layers[self._next_layer].routed_experts.expert_map_manager.is_moving = True
                return
            self._next_layer += 1
        self._targets, self._next_layer = None, 0
        self._reset()

    def _transfers(self, layer: int) -> TransferPlan:
        assert self._targets is not None
        ranks = self.group.size()
        before = self.physical_to_logical[layer].view(ranks, -1).tolist()
        return make_transfer_plan(before, self._targets[layer].view(ranks, -1).tolist())

    def _commit(self, layer: int) -> None:
        assert self._targets is not None
        self.mover.commit(self._rows(layer))
        self.physical_to_logical[layer] = self._targets[layer]
        self._write_maps(layer)
        self.layers[layer].routed_experts.process_weights_after_loading()

    def _rows(self, layer: int) -> list[torch.Tensor]:
        return self.layers[layer].routed_experts.get_expert_weights()

    def _write_maps(self, layer: int) -> None:
        """What routing and loading read of a layer's placement."""
        placed = self.physical_to_logical[layer].tolist()
        self.layers[layer].routed_experts.expert_map_manager.place(placed)
        maps = compute_logical_maps(
            self.physical_to_logical[layer : layer + 1], self.replica_count.shape[1]
        )
        table = self.logical_to_physical[layer]
        new = torch.full(table.shape, -1, dtype=table.dtype, device="cpu")
        new[:, : maps.logical_to_physical.shape[2]] = maps.logical_to_physical[0]
        table.copy_(new)
        self.replica_count[layer].copy_(maps.replica_count[0])

    def _reset(self) -> None:
        self._steps = 0
        self.expert_load.zero_()

    def _set_recording(self) -> None:
        counting = self._steps >= self.config.step_interval - self.config.window_size
        wanted = counting and not self.is_rearranging
        if wanted != self._recording:
            self._recording = wanted
            self.should_record.fill_(int(wanted))


def _expert_bytes(layer: BalancedLayer) -> int:
    return expert_bytes(layer.routed_experts.get_expert_weights())


def _check(layers: Sequence[BalancedLayer], group: dist.ProcessGroup) -> FusedMoEConfig:
    if not layers:
        raise ValueError("a balancer needs at least one layer")
    first, width = layers[0].moe_config, _expert_bytes(layers[0])
    for index, layer in enumerate(layers):
        moe = layer.moe_config
        parallel = moe.moe_parallel_config
        if (moe.num_experts, moe.num_logical_experts) != (
            first.num_experts,
            first.num_logical_experts,
        ):
            raise ValueError(
                f"layer {index} has {moe.num_experts} slots for {moe.num_logical_experts} experts, "
                f"layer 0 {first.num_experts} for {first.num_logical_experts}"
            )
        if (parallel.ep_size, parallel.ep_rank) != (group.size(), group.rank()):
            raise ValueError(
                f"layer {index} is rank {parallel.ep_rank} of {parallel.ep_size}, the group says "
                f"{group.rank()} of {group.size()}"
            )
        placement = layer.routed_experts.expert_map_manager.strategy
        if placement != "linear":
            raise ValueError(f"layer {index} is placed {placement}: only linear can be balanced")
        if _expert_bytes(layer) != width:
            raise ValueError(
                f"an expert of layer {index} has {_expert_bytes(layer)} bytes, of layer 0 {width}"
            )
    if first.num_experts % group.size():
        raise ValueError(f"{first.num_experts} slots do not divide over {group.size()} ranks")
    return first
