"""Tokens through the three stages: all at once, or in two halves that take turns.

One half is on the wire while the experts compute the other:

    wire      send A   send B              fetch A             fetch B
    compute            experts A           experts B           (shared experts)

The order of the calls is all it takes where a backend moves rows on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusedmoe.modular_kernel.prepare_finalize import FusedMoEPrepareAndFinalizeModular
from fusedmoe.modular_kernel.records import FinalizeWork, Hook, PrepareResult, PrepareWork, Receiver
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduce

Compute = Callable[[PrepareResult, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(what arrived, where prepare/finalize wants the experts' output or None, the layer's output) ->
the experts' output."""


def half_sizes(
    tokens_per_rank: Sequence[int], from_tokens: int | None
) -> tuple[list[int], list[int]] | None:
    """Every rank's tokens in the first half (the larger) and in the second; None: do not split.

    A pure function of what all ranks know, so that they decide alike. A single token of the largest
    rank is not split.
    """
    if from_tokens is None or max(tokens_per_rank) < max(from_tokens, 2):
        return None
    first = [count - count // 2 for count in tokens_per_rank]
    return first, [count // 2 for count in tokens_per_rank]


def finish(pending: Receiver | tuple[Hook, Receiver]) -> Any:
    """The result of an async form: its hook, if it has one, then its receiver."""
    if isinstance(pending, tuple):
        hook, receiver = pending
        hook()
        return receiver()
    return pending()


class Forward:
    """Tokens on their way through three stages, with the wire busy in between.

    ``send`` starts their dispatch; ``compute`` waits for it, runs the experts and starts the
    combine; ``fetch`` waits for that: the output is then valid.
    """

    def __init__(
        self,
        mover: FusedMoEPrepareAndFinalizeModular,
        compute: Compute,
        work: PrepareWork,
        output: torch.Tensor,
        reduce: TopKWeightAndReduce,
    ) -> None:
        self._mover = mover
        self._compute = compute
        self._work = work
        self._output = output
        self._reduce = reduce
        self._pending: Receiver | tuple[Hook, Receiver] = lambda: None

    def run(self, while_combining: Callable[[], None] | None) -> None:
        """All three stages; send and wait are two calls only where something runs in between."""
        prepared = self._mover.prepare(*self._work)
        if while_combining is None:
            self._mover.finalize(*self._results(prepared))
            return
        self._pending = self._mover.finalize_async(*self._results(prepared))
        while_combining()
        self.fetch()

    def send(self) -> None:
        self._pending = self._mover.prepare_async(*self._work)

    def compute(self) -> None:
        self._pending = self._mover.finalize_async(*self._results(finish(self._pending)))

    def fetch(self) -> None:
        finish(self._pending)

    def _results(self, prepared: PrepareResult) -> FinalizeWork:
        """What is to be finalized, once the experts have run on ``prepared`` (or a plain tuple)."""
        if not isinstance(prepared, PrepareResult):
            prepared = PrepareResult(*prepared)
        weights, ids = prepared.topk_weights, prepared.topk_ids
        weights = self._work.topk_weights if weights is None else weights
        ids = self._work.topk_ids if ids is None else ids
        prepared = prepared._replace(topk_weights=weights, topk_ids=ids)
        try:
            routed = self._compute(prepared, self._mover.expert_output(), self._output)
        except BaseException:
            self._mover.abandon()
            raise
        on_input = self._work.apply_router_weight_on_input
        return FinalizeWork(self._output, routed, weights, ids, on_input, self._reduce)


def run_halves(first: Forward, second: Forward, while_combining: Callable[[], None] | None) -> None:
    """Both, each on the wire while the experts have the other."""
    first.send()
    second.send()
    first.compute()
    second.compute()
    if while_combining is not None:
        while_combining()
    first.fetch()
    second.fetch()
