"""Routing by chance instead of by logits, to measure a layer under a chosen distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from fusedmoe.config import RoutingMethodType
from fusedmoe.router.base import BaseRouter, RoutingInputs
from fusedmoe.router.routers import finish_routing
from fusedmoe.router.spec import RoutingResult


class RoutingStrategy(ABC):
    """A distribution of tokens over experts."""

    @abstractmethod
    def route_tokens(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        indices_type: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [T, H], router_logits [T, E] -> weights fp32 [T, K], ids [T, K].

        ids are int64, or ``indices_type``.
        """


class UniformRandom(RoutingStrategy):
    """Each token's experts are any K different ones, each with weight 1."""

    def route_tokens(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        indices_type: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _check(router_logits, top_k)
        scores = torch.rand(router_logits.shape, device=router_logits.device)
        ids = scores.topk(top_k, dim=-1).indices.to(indices_type or torch.int64)
        return torch.ones(ids.shape, dtype=torch.float32, device=ids.device), ids


class NormalRouting(RoutingStrategy):
    """A bell over the expert numbers: id = floor(sigmoid(x) * E), x ~ N(mean, std).

    A token may meet an expert twice. Weights are |N(0, 1)|, normalized to sum to 1.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not std >= 0:
            raise ValueError(f"std must not be negative, got {std}")
        self.mean = mean
        self.std = std

    def route_tokens(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        indices_type: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _check(router_logits, top_k)
        num_tokens, num_experts = router_logits.shape
        shape, device = (num_tokens, top_k), router_logits.device
        place = torch.sigmoid(self.mean + self.std * torch.randn(shape, device=device))
        ids = (place * num_experts).floor().clamp(0, num_experts - 1)
        weights = torch.randn(shape, device=device).abs()
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        return weights, ids.to(indices_type or torch.int64)


class RoutingSimulator:
    """Strategies that choose experts by chance, by name: ``simulate_routing`` runs one,
    ``register_strategy`` adds one."""

    _strategies: ClassVar[dict[str, RoutingStrategy]] = {
        "uniform_random": UniformRandom(),
        "normal_routing": NormalRouting(),
    }

    @classmethod
    def register_strategy(cls, name: str, strategy: RoutingStrategy) -> None:
        """Make ``strategy`` known as ``name``; a name that is taken is replaced."""
        cls._strategies[name] = strategy

    @classmethod
    def get_available_strategies(cls) -> list[str]:
        """The names, sorted."""
        return sorted(cls._strategies)

    @classmethod
    def get_strategy(cls, name: str) -> RoutingStrategy:
        """The strategy called ``name``; ValueError where there is none."""
        strategy = cls._strategies.get(name)
        if strategy is None:
            known = ", ".join(cls.get_available_strategies())
            raise ValueError(f"no routing strategy is called {name!r}; known: {known}")
        return strategy

    @classmethod
    def simulate_routing(
        cls,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        strategy_name: str,
        top_k: int,
        indices_type: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights fp32 [T, K] and ids (int64 by default) [T, K] of the named strategy."""
        strategy = cls.get_strategy(strategy_name)
        return strategy.route_tokens(hidden_states, router_logits, top_k, indices_type)


class SimulatedRouter(BaseRouter):
    """Stands in for ``router``: as many picks, the same shared experts, hook and load balancing.

    The logits give it their shape alone.
    """

    routing_method_type = RoutingMethodType.Simulated

    def __init__(self, router: BaseRouter, strategy: RoutingStrategy | str) -> None:
        self.strategy = (
            RoutingSimulator.get_strategy(strategy) if isinstance(strategy, str) else strategy
        )
        self.top_k = router.top_k
        self.num_experts = router.num_experts
        self.num_fused_shared_experts = router.num_fused_shared_experts
        self.shared_expert_weight = router.shared_expert_weight
        self.eplb_state = router.eplb_state
        self.set_capture_fn(router.capture_fn)

    def compute_routing(self, given: RoutingInputs) -> RoutingResult:
        weights, ids = self.strategy.route_tokens(
            given.hidden_states,
            given.router_logits[:, : self.num_experts],
            self.top_k,
            given.indices_dtype,
        )
        return finish_routing(self, weights.float(), ids, given)


def _check(router_logits: torch.Tensor, top_k: int) -> None:
    if router_logits.dim() != 2:
        raise ValueError(f"router_logits must be [T, E], got {tuple(router_logits.shape)}")
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ValueError(f"top_k {top_k} does not lie in [1, {router_logits.shape[1]}] experts")
