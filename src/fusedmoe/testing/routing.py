"""Router logits with a known distribution of tokens over experts, for tests and benchmarks alike.

T tokens, E experts, K picks. The logits go through any rule that picks the K largest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

POWER = 1.2
_CHOSEN = 20.0


def _balanced(T: int, E: int, K: int, gen: torch.Generator) -> torch.Tensor:
    """Every expert gets T * K / E slots, give or take one."""
    order = torch.randperm(E, generator=gen)
    slots = torch.arange(T * K).view(T, K)
    return _choose(order[slots % E], E, gen)


def _uniform(T: int, E: int, K: int, gen: torch.Generator) -> torch.Tensor:
    """Every set of K experts is equally likely."""
    return torch.randn(T, E, generator=gen, dtype=torch.float32)


def _power_law(T: int, E: int, K: int, gen: torch.Generator) -> torch.Tensor:
    """Expert i of a random order is as popular as (i + 1) ** -1.2, K drawn without replacement."""
    rank = torch.randperm(E, generator=gen).float() + 1
    gumbel = -torch.log(torch.empty(T, E, dtype=torch.float32).exponential_(generator=gen))
    return gumbel - POWER * rank.log()


def _one_expert(T: int, E: int, K: int, gen: torch.Generator) -> torch.Tensor:
    """Every token picks the same expert first (and the same K - 1 others)."""
    return _choose(torch.randperm(E, generator=gen)[:K].expand(T, K), E, gen)


def _choose(ids: torch.Tensor, E: int, gen: torch.Generator) -> torch.Tensor:
    """Random logits in which ``ids`` [T, K] are the K largest, the first pick the very largest."""
    T, K = ids.shape
    logits = torch.rand(T, E, generator=gen, dtype=torch.float32)
    chosen = _CHOSEN + torch.arange(K, 0, -1.0, dtype=torch.float32)
    return logits.scatter_add_(1, ids, chosen.expand(T, K))


_DISTRIBUTIONS: dict[str, Callable[[int, int, int, torch.Generator], torch.Tensor]] = {
    "balanced": _balanced,
    "uniform": _uniform,
    f"power_law_{POWER}": _power_law,
    "one_expert": _one_expert,
}

ROUTINGS: tuple[str, ...] = tuple(_DISTRIBUTIONS)


def routing_logits(
    routing: str, T: int, E: int, K: int, seed: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Logits fp32 [T, E] of one of ``ROUTINGS``; the same numbers on every device.

    Raises ValueError for an unknown name and for K outside [1, E].
    """
    if routing not in _DISTRIBUTIONS:
        raise ValueError(f"unknown routing {routing!r}; known: {', '.join(ROUTINGS)}")
    if not 1 <= K <= E:
        raise ValueError(f"K {K} does not lie in [1, E {E}]")
    with torch.device("cpu"):
        gen = torch.Generator().manual_seed(seed)
        logits = _DISTRIBUTIONS[routing](T, E, K, gen)
    return logits.to(device)
