"""FusedMoERouter: the contract of everything that chooses experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from fusedmoe.config import RoutingMethodType

if TYPE_CHECKING:
    from fusedmoe.router.spec import RoutingResult


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
    ) -> RoutingResult:
        """hidden_states [T, H], router_logits [T, E] -> weights fp32 [T, K], ids [T, K].

        ids are int32, or ``topk_indices_dtype``. ``input_ids`` [T] are needed by hash routing and
        the vision bias; rows where ``is_padding`` [T] is True get id -1 and weight 0. Without
        expert load balancing the ids are global logical ids.
        """
