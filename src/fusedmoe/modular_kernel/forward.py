"""Tokens through the three stages: all at once, or in two halves that take turns.

One half is on the wire while the experts compute the other:

    wire      send A   send B              fetch A             fetch B
    compute            experts A           experts B           (shared experts)

The order of the calls is all it takes where a backend moves rows on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fusedmoe.modular_kernel.prepare_finalize import FusedMoEPrepareAndFinalizeModular
from fusedmoe.modular_kernel.records import Hook, PrepareResult, Receiver
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduce

Compute = Callable[[PrepareResult, torch.Tensor], torch.Tensor]
"""The experts' output of what arrived; the second argument is the tokens' own output."""


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


class Tokens(NamedTuple):
    """x [T, H], weights fp32 [T, K], ids [T, K], and where their output [T, H] goes."""

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    output: torch.Tensor

    def halves(self) -> tuple[Tokens, Tokens]:
        """Views, cut as ``half_sizes`` says."""
        cut = self.x.shape[0] - self.x.shape[0] // 2
        return Tokens(*(one[:cut] for one in self)), Tokens(*(one[cut:] for one in self))


class Forward:
    """Tokens on their way through the three stages: ``send``, ``compute``, ``fetch``."""

    def __init__(
        self,
        mover: FusedMoEPrepareAndFinalizeModular,
        compute: Compute,
        tokens: Tokens,
        num_experts: int,
        expert_map: torch.Tensor | None,
        on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool,
        reduce: TopKWeightAndReduce,
    ) -> None:
        self._mover = mover
        self._compute = compute
        self._tokens = tokens
        self._on_input = on_input
        self._reduce = reduce
        self._prepare: tuple[Any, ...] = (
            *(*tokens[:3], num_experts, expert_map, on_input),
            *(quant_config, defer_input_quant),
        )
        self._pending: Receiver | tuple[Hook, Receiver] = lambda: None

    def run(self, while_combining: Callable[[], None] | None) -> None:
        """All of it, waiting apart from sending only where something runs in between."""
        prepared = self._mover.prepare(*self._prepare)
        if while_combining is None:
            self._mover.finalize(*self._results(prepared))
            return
        self._pending = self._mover.finalize_async(*self._results(prepared))
        while_combining()
        self.fetch()

    def send(self) -> None:
        self._pending = self._mover.prepare_async(*self._prepare)

    def compute(self) -> None:
        self._pending = self._mover.finalize_async(*self._results(finish(self._pending)))

    def fetch(self) -> None:
        finish(self._pending)

    def _results(self, prepared: PrepareResult) -> tuple[Any, ...]:
        """The arguments of finalize, once the experts have run on ``prepared``."""
        _, weights, ids, output = self._tokens
        weights = weights if prepared.topk_weights is None else prepared.topk_weights
        ids = ids if prepared.topk_ids is None else prepared.topk_ids
        try:
            routed = self._compute(prepared._replace(topk_weights=weights, topk_ids=ids), output)
        except BaseException:
            self._mover.abandon()
            raise
        return output, routed, weights, ids, self._on_input, self._reduce


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
