"""FusedMoERouter: the contract of everything that chooses experts, and the template most share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fusedmoe.config import RoutingMethodType
from fusedmoe.router.functional import INDEX_DTYPES
from fusedmoe.router.spec import RoutingResult

CaptureFunction = Callable[[torch.Tensor], None]


class FusedMoERouter(ABC):
    """Chooses K experts for each token."""

    routing_method_type: RoutingMethodType = RoutingMethodType.Unspecified

    @abstractmethod
    def select_experts(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        topk_indices_dtype: torch.dtype | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [T, H], router_logits [T, E] -> weights fp32 [T, K], ids [T, K].

        ids are int32, or ``topk_indices_dtype``. ``input_ids`` [T] are needed by hash routing and
        the vision bias; rows where ``is_padding`` [T] is True get id -1 and weight 0. Without
        expert load balancing the ids are global logical ids.
        """


class RoutingInputs(NamedTuple):
    """The arguments of ``select_experts``, with the dtype that ids are wanted in."""

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    indices_dtype: torch.dtype
    input_ids: torch.Tensor | None
    is_padding: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class EplbState:
    """Where the replicas of each logical expert are, and where to count the load of one layer.

    logical_to_physical_map int [L, max replicas], logical_replica_count int [L],
    expert_load_view int32 [P] (counts are added to it). Nothing is counted while
    ``should_record`` (one element, on the device) is zero, nor in rows from
    ``num_unpadded_tokens`` (one integer, on the device) on; None: always, all rows.
    The tensors keep their addresses; a rebalancing writes into them.
    """

    expert_load_view: torch.Tensor
    logical_to_physical_map: torch.Tensor
    logical_replica_count: torch.Tensor
    should_record: torch.Tensor | None = None
    num_unpadded_tokens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        table, count = self.logical_to_physical_map, self.logical_replica_count
        if table.dim() != 2 or table.shape[1] < 1 or count.shape != table.shape[:1]:
            raise ValueError(
                "logical_to_physical_map must be [L, max replicas] and logical_replica_count [L], "
                f"got {tuple(table.shape)} and {tuple(count.shape)}"
            )
        load = self.expert_load_view
        if load.dim() != 1 or load.dtype is not torch.int32:
            raise ValueError(
                f"expert_load_view must be int32 [P], got {load.dtype} {tuple(load.shape)}"
            )


class BaseRouter(FusedMoERouter):
    """Routing, then the capture hook (logical ids), then the replicas chosen by load balancing.

    A subclass sets ``top_k`` and ``num_experts``: the routed picks of a token, and the experts of
    the model they are from. Fused shared experts come behind both. ``require_padding_mask``: a call
    without ``is_padding`` is an error.
    """

    top_k: int
    num_experts: int
    num_fused_shared_experts: int = 0
    shared_expert_weight: float = 1.0
    require_padding_mask: bool = False
    eplb_state: EplbState | None = None
    capture_fn: CaptureFunction | None = None

    @abstractmethod
    def compute_routing(self, given: RoutingInputs) -> RoutingResult:
        """Weights and logical ids, as ``select_experts`` describes them."""

    def select_experts(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        topk_indices_dtype: torch.dtype | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = hidden_states, router_logits, topk_indices_dtype
        return self.route(*given, input_ids=input_ids, is_padding=is_padding)[:2]

    def route(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        topk_indices_dtype: torch.dtype | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
    ) -> RoutingResult:
        """``select_experts``, with what the identity experts contribute."""
        indices_dtype = topk_indices_dtype or torch.int32
        if self.require_padding_mask and is_padding is None:
            raise ValueError("this router skips padding rows: is_padding [T] is needed")
        if indices_dtype not in INDEX_DTYPES:
            raise ValueError(f"ids hold -1, so {indices_dtype} is not one of {INDEX_DTYPES}")
        result = self.compute_routing(
            RoutingInputs(hidden_states, router_logits, indices_dtype, input_ids, is_padding)
        )
        if self.capture_fn is not None:
            self.capture_fn(result.topk_ids)
        if self.eplb_state is not None:
            from fusedmoe.kernels.eplb_map import eplb_map_to_physical_and_record

            state = self.eplb_state
            physical = eplb_map_to_physical_and_record(
                result.topk_ids,
                state.logical_to_physical_map,
                state.logical_replica_count,
                state.expert_load_view,
                should_record=state.should_record,
                num_unpadded_tokens=state.num_unpadded_tokens,
            )
            result = result._replace(topk_ids=physical)
        return result

    def set_capture_fn(self, capture_fn: CaptureFunction | None) -> None:
        """Call ``capture_fn(logical ids [T, K])`` after each routing; None stops it."""
        self.capture_fn = capture_fn

    def set_eplb_state(
        self,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
        *,
        should_record: torch.Tensor | None = None,
        num_unpadded_tokens: torch.Tensor | None = None,
    ) -> None:
        """From now on return physical ids and count their load; see ``EplbState``."""
        logical = self.num_experts + self.num_fused_shared_experts
        if logical_to_physical_map.shape[0] != logical:
            raise ValueError(
                f"logical_to_physical_map has {logical_to_physical_map.shape[0]} rows for "
                f"{logical} experts"
            )
        self.eplb_state = EplbState(
            expert_load_view=expert_load_view,
            logical_to_physical_map=logical_to_physical_map,
            logical_replica_count=logical_replica_count,
            should_record=should_record,
            num_unpadded_tokens=num_unpadded_tokens,
        )


def routing_by(router: Any, *rows: Any, **beside: Any) -> RoutingResult:
    """The choice of ``router``, with the arguments of ``select_experts``. It includes the part of
    identity experts, unless the router's class has a ``select_experts`` of its own."""
    if getattr(type(router), "select_experts", None) is BaseRouter.select_experts:
        result: RoutingResult = router.route(*rows, **beside)
        return result
    return RoutingResult(*router.select_experts(*rows, **beside))
