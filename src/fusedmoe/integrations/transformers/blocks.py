"""The forwards that take the place of a block's: its own modules, run by our runner.

A forward is a plain object set on the module instance, so that the module keeps its parameters,
its submodules and their names. T tokens, K picks, E experts, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusedmoe.config import MoEOptions
from fusedmoe.integrations.transformers.block_router import BlockRouter, is_hooked
from fusedmoe.integrations.transformers.borrowed import (
    BorrowedExperts,
    ExpertWeights,
    borrow_experts,
    gate_of_experts,
    module_weights,
)
from fusedmoe.integrations.transformers.families import INPUT_IDS, Family, at, resolve
from fusedmoe.integrations.transformers.gates import Gate
from fusedmoe.integrations.transformers.packed import (
    HeldExperts,
    PackedExperts,
    hold_experts,
    is_packed,
)
from fusedmoe.integrations.transformers.ranks import BlockRanks
from fusedmoe.integrations.transformers.replacement import Replacement
from fusedmoe.integrations.transformers.stacked import (
    StackedWeights,
    gate_of_list,
    stack_list,
    stack_rows,
)
from fusedmoe.runner.moe_runner import MoERunner
from fusedmoe.runner.replay import GraphReplay

# Looking at more addresses than this on each call costs more than replaying saves.
_MAX_REPLAYED_TENSORS = 32


def _tensor_of(owner: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter or buffer, without the cost of a module's own attribute look-up."""
    parameters = owner._parameters
    return parameters[name] if name in parameters else owner._buffers.get(name)


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
        self.replay = GraphReplay(self._compute, self._can_be_captured, max_rows=replay_rows)
        self.inner_modules = tuple(block.modules())[1:]
        self.owners = tuple(
            (owner, name)
            for owner in block.modules()
            for name in (*owner._parameters, *owner._buffers)
        )

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
        x = hidden_states.reshape(-1, self.width)
        if router.must_be_called:
            output, beside = self._run_asking(x, input_ids)
        elif self._replays(input_ids):
            output, beside = self.replay((x,), [_tensor_of(*pair) for pair in self.owners])
        else:
            output, beside = self._compute(x, input_ids)
        return self._as_returned(output, beside, hidden_states)

    def _compute(
        self, x: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and what the family returns beside it, by our router and experts."""
        logits = self.router.logits(x)
        output = self._after(self.runner(x, logits, input_ids))
        return output, self._beside(logits)

    def _beside(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [T, E], or the chosen experts' weights [T, K] where the family asks."""
        if not self.router.keep_result:
            return logits
        result, self.router.result = self.router.result, None
        assert result is not None
        return result.topk_weights.to(logits.dtype)

    def _can_be_captured(self) -> bool:
        experts = self.runner.routed_experts
        implementation = experts.quant_method.kernel(experts).experts
        checks = implementation.moe_config.options.debug_checks
        return implementation.capabilities().graph_capture and not checks

    def _replays(self, input_ids: torch.Tensor | None) -> bool:
        """Whether a call depends on nothing but x and the block's own tensors."""
        router = self.router
        watched = router.capture_fn is not None or router.eplb_state is not None
        return (
            input_ids is None
            and not watched
            and self.stack is None
            and len(self.owners) <= _MAX_REPLAYED_TENSORS
            and not is_hooked(self.inner_modules)
        )

    def _run_asking(
        self, x: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``_compute``, with the router module called, once, and its choice taken."""
        router = self.router
        router.answer = answer = router.ask(x, input_ids)
        try:
            output = self._after(self.runner(x, answer.logits, input_ids))
            return output, self._beside(answer.logits)
        finally:
            router.answer = None

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
        self, output: torch.Tensor, beside: torch.Tensor, hidden_states: torch.Tensor
    ) -> Any:
        returns = self.family.returns
        if returns == "flat_and_logits":
            return output, beside
        if returns == "flattened_and_logits":
            return output.flatten(), beside.flatten()
        output = output.view(hidden_states.shape)
        if returns in ("hidden_and_logits", "hidden_and_weights"):
            return output, beside
        return output


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
        weights, ids, _ = self.router.select_experts(x, logits, torch.int64)
        return torch.softmax(logits, dim=-1, dtype=torch.float32), weights, ids


def _owners(family: Family, block: nn.Module) -> tuple[nn.Module, ...]:
    """The submodules that hold the experts' tensors where the block is its own experts module."""
    names = (family.experts.w13, family.experts.w2)
    return tuple(at(block, str(name).rpartition(".")[0]) for name in names)


def make_replacements(
    block: nn.Module,
    family: Family,
    options: MoEOptions | None = None,
    replay_rows: int = 0,
    ranks: BlockRanks | None = None,
) -> list[Replacement]:
    """The forwards that a row asks for, not yet in place. Raises ValueError with what prevents it.

    Parameters that have to lie together are stacked here, after everything else was checked.
    ``ranks``: those that the block's experts are spread over.
    """
    if not family.whole:
        if ranks is not None:
            raise ValueError("its experts are replaced apart from the rest, which runs on one rank")
        return _make_parts(block, family, options)
    module = at(block, family.experts.at)
    gate = None if is_packed(module) else _gate(family, module)
    if ranks is not None and gate is None:
        raise ValueError("packed experts cannot be spread over ranks")
    router = BlockRouter(family.router, block)
    router.keep_result = family.returns == "hidden_and_weights"
    transforms = [
        None if isinstance(found := at(block, path), nn.Identity) else found
        for path in (family.input_projection, family.output_projection)
    ]
    demands: dict[str, bool | int] = {
        "weights_on_input": family.weights_on_input,
        "num_zero_experts": router.spec.num_zero_experts,
        "hash_routing": family.router.hash_table is not None,
        "require_modular": router.keep_result
        or family.router.decides
        or router.spec.num_zero_experts > 0
        or transforms[0] is not None,
    }
    weights: ExpertWeights | None = None
    experts: BorrowedExperts | HeldExperts
    if gate is None:
        experts = hold_experts(module, router.spec.top_k, options, **demands)
    else:
        weights = _weights(family, module)
        experts = _borrow(weights, gate, router.spec.top_k, options, demands, ranks)
    runner = MoERunner(
        experts.moe_config,
        router,
        experts,
        shared_experts=at(block, family.shared),
        shared_expert_gate=at(block, family.shared_gate),
        routed_input_transform=transforms[0],
        routed_output_transform=transforms[1],
        rank_sum=None if ranks is None else ranks.rank_sum,
    )
    # What other ranks bring changes from call to call.
    return [BlockForward(block, family, weights, runner, 0 if ranks else replay_rows)]


def _gate(family: Family, module: nn.Module) -> Gate:
    part = family.experts
    return gate_of_list(module[0]) if part.layout == "list" else gate_of_experts(part, module)  # type: ignore[index]


def _borrow(
    weights: ExpertWeights,
    gate: Gate,
    top_k: int,
    options: MoEOptions | None,
    demands: dict[str, Any],
    ranks: BlockRanks | None,
) -> BorrowedExperts:
    """Experts on the module's tensors; what was stacked for them is released if there are none."""
    try:
        return borrow_experts(weights, gate, top_k, options=options, ranks=ranks, **demands)
    except ValueError:
        if isinstance(weights, StackedWeights):
            weights.stack.release()
        raise


def _make_parts(block: nn.Module, family: Family, options: MoEOptions | None) -> list[Replacement]:
    module = at(block, family.experts.at)
    router_module = at(block, family.router.at)
    made: list[Replacement] = []
    top_k = getattr(router_module, "top_k", None)
    if family.router.rule:
        router = BlockRouter(family.router, block)
        top_k = router.spec.top_k
        made.append(RouterForward(router_module, router))
    if isinstance(module, PackedExperts):
        return made
    gate = gate_of_experts(family.experts, module)
    experts = borrow_experts(_weights(family, module), gate, top_k or 1, options=options)
    return [*made, ExpertsForward(module, experts)]


def _weights(family: Family, module: nn.Module) -> ExpertWeights:
    part = family.experts
    if part.layout == "list":
        return stack_list(module)  # type: ignore[arg-type]
    if part.layout == "rows":
        gate, up = (name.rpartition(".") for name in part.w13)
        owner = at(module, gate[0])
        down = part.w2.rpartition(".")[2]
        return stack_rows(owner, gate[2], up[2], down, at(module, "num_experts"))
    return module_weights(part, module)
