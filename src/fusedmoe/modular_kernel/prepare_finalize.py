"""The contract of prepare and finalize: how tokens reach the experts' rank and come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.modular_kernel.records import (
    FinalizeWork,
    FusedMoEActivationFormat,
    Hook,
    MonolithicPrepareResult,
    PrepareResult,
    PrepareWork,
    Receiver,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.topk_weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceNaiveBatched,
)


class FusedMoEPrepareAndFinalize:
    """What both kinds of prepare/finalize say about themselves.

    ``row_format`` is the format of the rows it delivers, ``name`` what options and ``explain``
    call it.
    """

    name: ClassVar[str] = ""
    launches_the_wire: ClassVar[bool] = False
    """Whether launches on the caller's stream move the rows, not a stream of the backend's."""
    row_format: ClassVar[FusedMoEActivationFormat] = FusedMoEActivationFormat.Standard

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        """Why it cannot move this layer's tokens over ``groups``; None where it can."""
        return None

    @classmethod
    def make(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> FusedMoEPrepareAndFinalize:
        """Build it for one layer."""
        return cls()

    def begin(self, tokens_per_rank: Sequence[int] | None = None) -> Self:
        """The object that serves one forward, from its prepare to its finalize.

        What has to be remembered between the two is kept there, so that several forwards may be
        on their way at once. ``tokens_per_rank``: how many tokens each dispatcher brings, where
        the caller knows. Implementations that remember nothing return themselves.
        """
        return self

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return self.row_format

    def topk_indices_dtype(self) -> torch.dtype | None:
        """The integer dtype ids must arrive in, or None for any."""
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        """Rows per expert and rank that a batched format holds; None in Standard format."""
        return None

    def num_dispatchers(self) -> int:
        """How many ranks send tokens to this one."""
        return 1

    def output_is_reduced(self) -> bool:
        """Whether finalize's output needs no further sum over ranks; it does where ranks that share
        tokens (tensor parallel) still hold parts of the sum."""
        return False

    def supports_async(self) -> bool:
        """Whether the ``*_async`` forms return before the wire is done."""
        return False

    def concurrent_forwards(self) -> int:
        """How many forwards may be between their prepare and their finalize at once."""
        return 1

    def abandon(self) -> None:
        """Put back what prepare has changed: this forward has failed and comes to no finalize."""
        return

    def sizes_for(self, num_tokens: int) -> list[int]:
        """Tokens of every dispatcher, this one bringing ``num_tokens``."""
        return [num_tokens]


class FusedMoEPrepareAndFinalizeModular(FusedMoEPrepareAndFinalize):
    """Moves tokens whose experts are already chosen.

    An implementation defines ``dispatch`` and ``combine``; or, with the same arguments one by one,
    ``prepare`` and ``finalize``, which are what is called. One whose wire works by itself also
    defines how each is started. ``rows_may_be_late``: the experts that follow take rows that are
    still on their way.
    """

    rows_may_be_late: bool = False

    def check_rows_as(self, key: QuantKey | None) -> None:
        """Raise ValueError where it cannot bring rows in the format ``key`` (None: as they are)."""
        return

    def expert_output(self) -> torch.Tensor | None:
        """Where the experts are to write after ``prepare``, if their output has that shape and
        dtype; None for anywhere."""
        return None

    def prepare(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> PrepareResult:
        """Weight the input if asked (K must be 1), quantize unless deferred, dispatch.

        The arguments are ``PrepareWork``'s. ``a1`` itself is not written.
        """
        tokens = a1, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input
        return self.dispatch(PrepareWork(*tokens, quant_config, defer_input_quant))

    def dispatch(self, work: PrepareWork) -> PrepareResult:
        """As ``prepare``."""
        raise NotImplementedError(f"{type(self).__name__} defines neither dispatch nor prepare")

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> Receiver | tuple[Hook, Receiver]:
        """Start ``prepare``; the receiver (after the hook, if there is one) returns its result."""
        tokens = a1, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input
        return self.start_dispatch(PrepareWork(*tokens, quant_config, defer_input_quant))

    def start_dispatch(self, work: PrepareWork) -> Receiver | tuple[Hook, Receiver]:
        """As ``prepare_async``."""
        result = self.prepare(*work)
        return lambda: result

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        """Weight, sum over K and combine into ``output`` [T, H], in place: ``FinalizeWork``."""
        routed = fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input
        self.combine(FinalizeWork(output, *routed, weight_and_reduce_impl))

    def combine(self, work: FinalizeWork) -> None:
        """As ``finalize``."""
        raise NotImplementedError(f"{type(self).__name__} defines neither combine nor finalize")

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> Receiver | tuple[Hook, Receiver]:
        """Start ``finalize``; ``output`` is valid once the receiver has returned."""
        routed = fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input
        return self.start_combine(FinalizeWork(output, *routed, weight_and_reduce_impl))

    def start_combine(self, work: FinalizeWork) -> Receiver | tuple[Hook, Receiver]:
        """As ``finalize_async``."""
        self.finalize(*work)
        return lambda: None

    def weight_and_sum(self, work: FinalizeWork, output: torch.Tensor | None) -> torch.Tensor:
        """Weight and sum as much as the experts have left to do: [rows, H], in ``output`` if given.

        Where they leave the way open (``TopKWeightAndReduceDelegate``), ``row_format`` decides it.
        """
        own: TopKWeightAndReduce = TopKWeightAndReduceContiguous()
        if self.row_format is FusedMoEActivationFormat.BatchedExperts:
            own = TopKWeightAndReduceNaiveBatched(rank=0)
        _, routed, weights, ids, on_input, reduce = work
        return reduce.or_else(own).apply(output, routed, weights, ids, on_input)


class FusedMoEPrepareAndFinalizeMonolithic(FusedMoEPrepareAndFinalize, ABC):
    """Moves tokens together with their router logits; the experts route."""

    @abstractmethod
    def prepare(
        self,
        a1: torch.Tensor,
        router_logits: torch.Tensor,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> MonolithicPrepareResult:
        """a1 [T, H] and router_logits float [T, E] -> those of all rows that the experts here get;
        quantized as ``quant_config`` says unless deferred."""

    @abstractmethod
    def finalize(self, fused_expert_output: torch.Tensor) -> torch.Tensor:
        """The experts' output for those rows -> [T, H] of this rank's own tokens."""
