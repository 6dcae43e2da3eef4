"""A block's own router module, as our runner asks it: by its rule, or by calling it.

T tokens, K picks, E experts, H hidden.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import nn

from fusedmoe.config import MoEOptions
from fusedmoe.integrations.transformers.families import INPUT_IDS, Router, at
from fusedmoe.kernels.gate import gate_linear
from fusedmoe.router.base import RoutingInputs
from fusedmoe.router.routers import SpecRouter
from fusedmoe.router.spec import RoutingResult, RoutingTensors


class Answer(NamedTuple):
    """What a router module returned: logits [T, E], and weights and ids [T, K] if it chose."""

    logits: torch.Tensor
    weights: torch.Tensor | None = None
    ids: torch.Tensor | None = None


def is_hooked(modules: tuple[nn.Module, ...]) -> bool:
    """Whether someone listens to one of ``modules``."""
    for module in modules:  # noqa: SIM110 (a generator takes the host three times as long)
        if module._forward_hooks or module._forward_pre_hooks:
            return True
    return False


class OfCall(threading.local):
    """What belongs to a call of the block, and so to the thread that makes it; copies are empty."""

    answer: Answer | None = None
    result: RoutingResult | None = None

    def __reduce__(self) -> tuple[type[OfCall], tuple[()]]:
        return OfCall, ()


class BlockRouter(SpecRouter):
    """Routes by the rule of a block's router, with the weights and biases that the block holds.

    A router that must decide by itself, and one that someone listens to, is called as the block
    would call it (``ask``); its choice is taken while it stands in ``call.answer``.
    """

    def __init__(self, row: Router, block: nn.Module, options: MoEOptions | None = None) -> None:
        # Plain attributes: the block's modules must not become submodules here.
        self.__dict__.update(row=row, block=block, module=at(block, row.at))
        self.listened = tuple(self.module.modules())
        self.call = OfCall()
        self.keep_result = False
        self.batch_invariant = options is not None and options.batch_invariant
        super().__init__(row.spec(block), self._current_tensors)

    row: Router
    block: nn.Module
    module: nn.Module

    def _current_tensors(self) -> RoutingTensors:
        return RoutingTensors(
            correction_bias=at(self.block, self.row.correction_bias),
            per_expert_scale=at(self.block, self.row.per_expert_scale),
            hash_indices_table=at(self.block, self.row.hash_table),
        )

    @property
    def must_be_called(self) -> bool:
        return self.row.decides or is_hooked(self.listened)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, E], in the dtype that the module computes them in."""
        row, module = self.row, self.module
        weight = at(module, row.weight)
        if row.transform is not None:
            x = row.transform(module, x)
        dtype = torch.float32 if row.fp32_logits else weight.dtype
        return gate_linear(
            *(x, weight, at(module, row.bias)),
            out_dtype=dtype,
            batch_invariant=self.batch_invariant,
        )

    def ask(self, x: torch.Tensor, input_ids: torch.Tensor | None) -> Answer:
        """Call the module with x [T, H]. Without logits among its results, x stands for them."""
        row = self.row
        arguments = [
            input_ids if name == INPUT_IDS else at(self.block, name) for name in row.arguments
        ]
        returned = self.module(x[None] if row.takes_3d else x, *arguments)
        if not isinstance(returned, tuple):
            return Answer(returned)
        logits, weights, ids = (None if i is None else returned[i] for i in row.returned)
        return Answer(x if logits is None else logits, weights, ids)

    def compute_routing(self, given: RoutingInputs) -> RoutingResult:
        answer = self.call.answer
        if answer is None or answer.weights is None or answer.ids is None:
            result = super().compute_routing(given)
        else:
            result = self._as_chosen(answer.weights.float(), answer.ids, given.indices_dtype)
        if self.keep_result:
            self.call.result = result
        return result

    def _as_chosen(
        self, weights: torch.Tensor, ids: torch.Tensor, indices_dtype: torch.dtype
    ) -> RoutingResult:
        """The module's choice in our terms: ids past the real experts are identities."""
        if not self.spec.num_zero_experts:
            return RoutingResult(weights, ids.to(indices_dtype))
        identity = ids >= self.spec.num_experts
        return RoutingResult(
            weights.masked_fill(identity, 0.0),
            ids.masked_fill(identity, -1).to(indices_dtype),
            weights.masked_fill(~identity, 0.0).sum(-1),
        )
