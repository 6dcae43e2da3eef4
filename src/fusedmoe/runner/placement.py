"""Where a layer's experts are, and the tables by which balancing moves them."""

from __future__ import annotations

import torch
from torch import nn

from fusedmoe.config import FusedMoEConfig
from fusedmoe.router.base import FusedMoERouter
from fusedmoe.weights.expert_map import ExpertMapManager
from fusedmoe.weights.routed_experts import RoutedExperts


class PlacedLayer(nn.Module):
    """A layer whose experts have places: on ranks, and with ``enable_eplb`` in replicas."""

    moe_config: FusedMoEConfig
    router: FusedMoERouter
    routed_experts: RoutedExperts
    enable_eplb: bool

    @property
    def expert_map_manager(self) -> ExpertMapManager:
        return self.routed_experts.expert_map_manager

    @property
    def expert_local_to_global(self) -> torch.Tensor | None:
        """int32 [e]: global id of each row of the weights; None on one rank (they are equal)."""
        return self.routed_experts.expert_local_to_global

    @property
    def expert_physical_to_global(self) -> torch.Tensor | None:
        """int32 [E]: global id of each row of all ranks' weights; None on one rank."""
        return self.routed_experts.expert_physical_to_global

    def set_eplb_state(
        self,
        moe_layer_idx: int,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
        *,
        should_record: torch.Tensor | None = None,
        num_unpadded_tokens: torch.Tensor | None = None,
    ) -> None:
        """Route to physical replicas and count their load from now on.

        expert_load_view int32 [layers, E], logical_to_physical_map int [layers, logical, max
        replicas] and logical_replica_count int [layers, logical]; this layer uses views of row
        ``moe_layer_idx``, so that writing into the tensors rebalances it. Nothing is counted
        while ``should_record`` (one element) is zero, nor in rows from ``num_unpadded_tokens`` (one
        integer) on; both are read on the device.
        """
        if not self.enable_eplb:
            raise ValueError("this layer was built with enable_eplb=False")
        layers = expert_load_view.shape[0]
        if not 0 <= moe_layer_idx < layers:
            raise ValueError(f"moe_layer_idx {moe_layer_idx} does not lie in [0, {layers})")
        moe = self.moe_config
        if expert_load_view.shape[1:] != (moe.num_experts,):
            raise ValueError(
                f"expert_load_view must be [layers, {moe.num_experts}], "
                f"got {tuple(expert_load_view.shape)}"
            )
        counted = {"should_record": should_record, "num_unpadded_tokens": num_unpadded_tokens}
        self.router.set_eplb_state(  # type: ignore[attr-defined]
            expert_load_view[moe_layer_idx],
            logical_to_physical_map[moe_layer_idx],
            logical_replica_count[moe_layer_idx],
            **{name: tensor for name, tensor in counted.items() if tensor is not None},
        )
