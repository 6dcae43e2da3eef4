"""What torch.compile sees of a layer's router and experts: one operator.

Traced through, they leave some 180 guards, which the host checks before each call of the compiled
program. Gate, shared experts and transforms are modules of the caller's: a compiler sees them.

T tokens, H hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from fusedmoe.quantization.quantized import QuantizedFusedMoEMethod
from fusedmoe.quantization.unquantized import UnquantizedFusedMoEMethod
from fusedmoe.router.routers import SpecRouter
from fusedmoe.runner.inputs import TokenBatch
from fusedmoe.runner.opaque import (
    are_plain,
    can_be_opaque,
    in_place,
    new_number,
    owners_in,
    part_of,
    tensors_of,
)
from fusedmoe.runner.placement import PlacedLayer
from fusedmoe.runner.reduction import Extent, RankSum, Summand
from fusedmoe.runner.shared_experts import SharedExpertsRun
from fusedmoe.weights.routed_experts import RoutedExperts


class CompiledLayer(PlacedLayer):
    """A layer whose routed part may be one operator, on its parameters and buffers."""

    rank_sum: RankSum
    expert_substitution: Any

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = new_number(self)

    @abstractmethod
    def run_routed(
        self,
        batch: TokenBatch,
        x: torch.Tensor,
        shared: SharedExpertsRun | None,
        tokens_per_rank: Sequence[int] | None,
    ) -> tuple[Summand, torch.Tensor | None]:
        """The routed output in the checkpoint's hidden size, and the zero experts' weights [T]."""

    def number_parts(self) -> None:
        """Call this once router and experts are there."""
        self._find_tensors()
        self.number = new_number(self)
        # Read here, because a guard on ``rank_sum`` would keep a layer's guards from being skipped.
        self.is_one_of_many = self.rank_sum.size > 1

    def _find_tensors(self) -> None:
        """Whose parameters and buffers an operator is given; a new format brings others."""
        parts = (self.routed_experts, self.router)
        found = owners_in(*(part for part in parts if isinstance(part, torch.nn.Module)))
        if found != (getattr(self, "owners", None), getattr(self, "names", None)):
            self.owners, self.names = found
            # A router with tensors holds them itself, and so is the last of the owners.
            self.router_key = next(reversed(self.owners), "")

    def is_one_operator(self, x: torch.Tensor) -> bool:
        """Whether torch.compile, which is tracing a call with x [T, H], is to see one operator."""
        if (
            not torch.compiler.is_dynamo_compiling()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or not can_be_opaque(self.number)
        ):
            return False
        # By the path of ``tensors_of``: two paths to one module keep guards from being skipped.
        router: Any = self.owners[self.router_key]
        return router.eplb_state is None and router.capture_fn is None

    def can_be_opaque(self) -> bool:
        """As ``Opaque`` says. Not so with a caller's own classes or hooks, with zero or removed
        experts, and where tokens come from other ranks or a kernel holds weights in its order."""
        experts, router = self.routed_experts, self.router
        method = experts.quant_method
        self._find_tensors()
        return (
            type(experts) is RoutedExperts
            and type(method) in (UnquantizedFusedMoEMethod, QuantizedFusedMoEMethod)
            and method.kernel(experts).prepare_finalize.num_dispatchers() == 1
            and not method.kernel(experts).output_is_reduced
            and self.moe_config.num_zero_experts == 0
            and self.expert_substitution is None
            and isinstance(router, SpecRouter)
            and router.holds_its_tensors
            and are_plain(tensors_of(self.owners, self.names))
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (experts, router))
        )

    def as_operator(self, batch: TokenBatch, x: torch.Tensor) -> Summand:
        """The routed output of ``run_routed`` for a batch with its logits."""
        output = routed_experts(x, list(batch), tensors_of(self.owners, self.names), self.number)
        return Summand(output, Extent.PARTIAL if self.is_one_of_many else Extent.WHOLE)


@torch.library.custom_op("fusedmoe::routed_experts", mutates_args=())
def routed_experts(
    x: torch.Tensor,
    batch: Sequence[torch.Tensor | None],
    tensors: Sequence[torch.Tensor | None],
    number: int,
) -> torch.Tensor:
    """Router and experts of layer ``number`` for x [T, H] -> [T, H]; ``batch`` is a TokenBatch."""
    layer: CompiledLayer = part_of(number)
    method = layer.routed_experts.quant_method
    with (
        in_place(layer.owners, layer.names, tensors) as are_others,
        method.kernel_kept() if are_others else nullcontext(),
    ):
        routed, _ = layer.run_routed(TokenBatch(*batch), x, None, None)  # type: ignore[arg-type]
    return routed.value.contiguous()


@routed_experts.register_fake
def _(
    x: torch.Tensor,
    batch: Sequence[torch.Tensor | None],
    tensors: Sequence[torch.Tensor | None],
    number: int,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
