"""Each token goes once to each rank that holds one of its experts, and comes back as one sum.

The ranks that host experts of a token add up their part before they send it, so that at most
min(K, ranks) copies of a row cross the wire in either direction. How many rows go where is decided
by the routing, so the host waits for it: not for CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fusedmoe.distributed.collectives import exchange_rows, gather_vectors, sum_dtype
from fusedmoe.modular_kernel import PrepareResult, PrepareWork
from fusedmoe.prepare_finalize.dispatch import DispatchingModular


@dataclass
class _Journey:
    """Rows sent to each rank and received from each, and the token of each row sent."""

    num_tokens: int
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    token: torch.Tensor | None = None


class AllToAllPrepareAndFinalize(DispatchingModular):
    """[T of this rank, H] -> the rows that need an expert of this rank, and back.

    Those arrive by rank of origin and then by token.
    """

    name = "all_to_all"
    by_expert = True
    _journey: _Journey

    def start_dispatch(self, work: PrepareWork) -> Callable[[], PrepareResult]:
        """Returns once the ranks have told each other how many rows they send."""
        ids, num_experts = work.topk_ids, work.num_experts
        hosts = self.hosts_of(num_experts, work.expert_map).table
        rows, scale = self.quantized(work.weighted_input, work.quant_config, work.defer_input_quant)
        luggage = self.luggage([work.topk_weights, ids], scale)
        known = (ids >= 0) & (ids < num_experts)
        hosted = hosts[:, ids.long().clamp(0, num_experts - 1)] & known  # [ranks, T, K]
        goes = hosted.any(dim=-1)
        journey = self._plan(goes)
        token, group = journey.token, self.ranks.axes[0]
        arriving = exchange_rows(rows[token], journey.sent, journey.received, group)
        beside = exchange_rows(luggage.packed()[token], journey.sent, journey.received, group)
        self._journey = journey

        def receive() -> PrepareResult:
            (weights, arrived_ids), scales = self.unpacked(luggage, beside())
            return PrepareResult(arriving(), scales, None, arrived_ids, weights)

        return receive

    def _plan(self, goes: torch.Tensor) -> _Journey:
        """goes bool [ranks, T] -> who sends how many rows to whom, agreed by all."""
        T, rank = goes.shape[1], self.ranks.rank
        if self._given_sizes is not None or self.compares_sizes:
            self.sizes_for(T)
        told = gather_vectors([T, *goes.sum(dim=1).tolist()], self.ranks)
        tokens = [counts[0] for counts in told]
        self.check_room(tokens)
        return _Journey(
            T,
            sent=told[rank][1:],
            received=[counts[1 + rank] for counts in told],
            token=goes.nonzero()[:, 1],
        )

    def send_back(self, sums: torch.Tensor, output: torch.Tensor) -> Callable[[], None]:
        journey = self._journey
        back = exchange_rows(sums, journey.received, journey.sent, self.ranks.axes[0])

        def receive() -> None:
            output.copy_(_sum_copies(back(), journey))

        return receive


def _sum_copies(rows: torch.Tensor, journey: _Journey) -> torch.Tensor:
    """Each token's copies [sum(sent), H] added up in the order of the ranks, fp32: [T, H]."""
    wide = sum_dtype(rows.dtype)
    total = rows.new_zeros(journey.num_tokens, *rows.shape[1:], dtype=wide)
    assert journey.token is not None
    tokens = journey.token.split(journey.sent)
    for token, part in zip(tokens, rows.split(journey.sent), strict=True):
        total.index_add_(0, token, part.to(wide))  # a rank sends a token back once: no race
    return total
