"""The forwards that take the place of a block's: its own modules, run by our runner.

A forward is set on the module's instance as a plain attribute, so that the module keeps its
parameters, its submodules and their names. T tokens, K picks, E experts, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusedmoe.integrations.transformers.block_router import BlockRouter, is_hooked
from fusedmoe.integrations.transformers.borrowed import BorrowedExperts, ExpertWeights
from fusedmoe.integrations.transformers.compiled_block import accelerated_block
from fusedmoe.integrations.transformers.device_hooks import is_offloaded
from fusedmoe.integrations.transformers.families import INPUT_IDS, Family, at, resolve
from fusedmoe.integrations.transformers.replacement import Replacement
from fusedmoe.integrations.transformers.stacked import StackedWeights
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.runner.opaque import are_plain, can_be_opaque, new_number, owners_in, tensors_of
from fusedmoe.runner.replay import GraphReplay

# Looking at more addresses than this on each call costs more than replaying saves.
_MAX_REPLAYED_TENSORS = 32


class BlockForward(Replacement):
    """One whole block: router, experts, shared experts and what stands around them."""

    def __init__(
        self,
        block: nn.Module,
        family: Family,
        weights: ExpertWeights | None,
        runner: MoERunner,
        replay_rows: int,
    ) -> None:
        experts = at(block, family.experts.at)
        super().__init__(
            block,
            noisy=family.noisy,
            listened=_owners(family, block) if experts is block else tuple(experts.modules()),
            experts=runner.routed_experts,  # type: ignore[arg-type]
        )
        self.family = family
        self.runner = runner
        self.router: BlockRouter = runner.router  # type: ignore[assignment]
        self.stack = weights.stack if isinstance(weights, StackedWeights) else None
        self.width: int = at(self.router.module, family.router.weight).shape[1]
        self.output_scale: float = resolve(family.output_scale, block)
        self.replay = GraphReplay(self._launched, self._can_be_captured, max_rows=replay_rows)
        self.inner_modules = tuple(block.modules())[1:]
        self.owners, self.names = owners_in(block)
        few_tensors = sum(len(held) for _, held in self.names) <= _MAX_REPLAYED_TENSORS
        self.replayable = few_tensors and self.stack is None and not family.router.decides
        self.returns = family.returns
        self.number = new_number(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = new_number(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if self._is_opaque(args, kwargs):
                x = args[0].reshape(-1, args[0].shape[-1])
                parts = accelerated_block(x, tensors_of(self.owners, self.names), self.number)
                return self._as_returned(parts, args[0])
        elif len(args) == 1 and not kwargs and self._only_replays(args[0]):
            return self._replayed(args)
        return super().forward(*args, **kwargs)

    def _only_replays(self, x: torch.Tensor) -> bool:
        """Whether ``super().forward`` would do nothing to x but what ``_replayed`` does.

        It asks the same, in several functions, which takes longer than a graph's launch.
        """
        if torch.is_grad_enabled() or not x.is_cuda or torch.is_autocast_enabled("cuda"):
            return False
        module = self.module
        if (self.noisy and module.training) or not self._replays():
            return False
        children = module._modules
        for name, child in self.parts:
            if children.get(name) is not child or is_offloaded(child):
                return False
        return True

    def _replayed(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        parts = self.replay(inputs, tensors_of(self.owners, self.names))
        return parts[0] if self.returns == "hidden" else parts

    def _is_opaque(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether torch.compile is to see one operator."""
        return (
            len(args) == 1
            and not kwargs
            and not torch.is_grad_enabled()
            and not (self.noisy and self.module.training)
            and not torch.is_autocast_enabled(args[0].device.type)
            and can_be_opaque(self.number)
        )

    def can_be_opaque(self) -> bool:
        """As ``OpaqueBlock`` says."""
        return (
            not self.family.takes_input_ids
            and not self.router.row.decides
            and not self._has_other_parts()
            and self.runner.rank_sum.size == 1
            and self._replays()
            and are_plain(tensors_of(self.owners, self.names))
        )

    def beside_like(self, x: torch.Tensor) -> torch.Tensor:
        """As ``OpaqueBlock`` says."""
        router = self.router
        weight = at(router.module, router.row.weight)
        dtype = torch.float32 if router.row.fp32_logits else weight.dtype
        spec = router.spec
        width = (
            spec.top_k + spec.num_fused_shared_experts if router.keep_result else weight.shape[0]
        )
        return x.new_empty(x.shape[0], width, dtype=dtype)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if not self.family.takes_input_ids:
            return (args[0], None) if len(args) == 1 and not kwargs else None
        if len(args) == 1 and kwargs.keys() <= {INPUT_IDS}:
            return args[0], kwargs.get(INPUT_IDS)
        return args if len(args) == 2 and not kwargs else None

    def release(self) -> None:
        super().release()
        if self.stack is not None:
            self.stack.release()

    def run(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None) -> Any:
        router = self.router
        if self.stack is not None and not torch.compiler.is_compiling():
            self.stack.refresh()
        if input_ids is None and self._replays():
            return self._replayed((hidden_states,))
        x = hidden_states.reshape(-1, self.width)
        run = self._run_asking if router.must_be_called else self.compute
        return self._as_returned(run(x, input_ids), hidden_states)

    def compute(
        self, x: torch.Tensor, input_ids: torch.Tensor | None = None, *, one_stream: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and what the family returns beside it, by our router and experts."""
        logits = self.router.logits(x)
        output = self._after(self.runner(x, logits, input_ids, one_stream=one_stream))
        return output, self._beside(logits)

    def _launched(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the block returns, by ``compute``: nothing else is copied out of a graph."""
        parts = self.compute(hidden_states.reshape(-1, self.width))
        returned = self._as_returned(parts, hidden_states)
        return returned if isinstance(returned, tuple) else (returned,)

    def _beside(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [T, E], or the chosen experts' weights [T, K] where the family asks."""
        if not self.router.keep_result:
            return logits
        call = self.router.call
        result, call.result = call.result, None
        assert result is not None
        return result.topk_weights.to(logits.dtype)

    def _can_be_captured(self) -> bool:
        experts = self.runner.routed_experts
        implementation = experts.quant_method.kernel(experts).experts
        checks = implementation.moe_config.options.debug_checks
        return implementation.capabilities().graph_capture and not checks

    def _replays(self) -> bool:
        """Whether a call without token ids depends on nothing but x and the block's own tensors."""
        router = self.router
        if not self.replayable or router.capture_fn is not None or router.eplb_state is not None:
            return False
        return not is_hooked(self.inner_modules)

    def _run_asking(
        self, x: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``compute``, with the router module called, once, and its choice taken."""
        router = self.router
        router.call.answer = answer = router.ask(x, input_ids)
        try:
            output = self._after(self.runner(x, answer.logits, input_ids))
            return output, self._beside(answer.logits)
        finally:
            router.call.answer = None

    def _after(self, output: torch.Tensor) -> torch.Tensor:
        """What the block does to the sum of routed and shared experts [T, H]."""
        family, block = self.family, self.module
        if self.output_scale != 1.0:
            output = output * self.output_scale
        if family.output_bias is not None:
            output = output + at(block, family.output_bias)
        if family.output_norm is not None:
            output = at(block, family.output_norm)(output)
        return output

    def _as_returned(
        self, parts: tuple[torch.Tensor, ...], hidden_states: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``parts``: the output [T, H] and, unless that is all, what stands beside it."""
        returns = self.returns
        if returns == "hidden":
            return parts[0].view_as(hidden_states)
        output, beside = parts
        if returns == "flat_and_logits":
            return output, beside
        if returns == "flattened_and_logits":
            return output.flatten(), beside.flatten()
        return output.view_as(hidden_states), beside


class ExpertsForward(Replacement):
    """The experts module alone, called with what the model's router chose."""

    def __init__(self, module: nn.Module, experts: BorrowedExperts) -> None:
        super().__init__(module, listened=tuple(module.children()), experts=experts)
        self.experts = experts

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        return args if len(args) == 3 and not kwargs else None

    def run(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        num_experts = self.experts.moe_config.num_experts
        ids = top_k_index.masked_fill(top_k_index == num_experts, -1)
        return self.experts.forward_modular(hidden_states, top_k_weights.float(), ids)


class RouterForward(Replacement):
    """The router module alone: x [T, H] -> (probabilities [T, E], weights, ids [T, K])."""

    def __init__(self, module: nn.Module, router: BlockRouter) -> None:
        super().__init__(module)
        self.router = router

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        return args if len(args) == 1 and not kwargs else None

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.router.logits(x)
        weights, ids = self.router.select_experts(x, logits, torch.int64)
        return torch.softmax(logits, dim=-1, dtype=torch.float32), weights, ids


def _owners(family: Family, block: nn.Module) -> tuple[nn.Module, ...]:
    """The submodules that hold the experts' tensors where the block is its own experts module."""
    names = (family.experts.w13, family.experts.w2)
    return tuple(at(block, str(name).rpartition(".")[0]) for name in names)
